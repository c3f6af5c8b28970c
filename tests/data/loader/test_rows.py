"""Rows of several sources: processes, resumes, packing, fill-in-the-middle, damage; each against a slow reference."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from k2jax.config import Config
from k2jax.data.loader.batches import num_windows, train_batches, validation_batches
from k2jax.data.loader.corpus import open_corpus, open_data
from k2jax.data.loader.fim import fill_in_middle
from k2jax.data.loader.packing import pack
from k2jax.data.loader.rows import BadRow, RowReader
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.store.writer import PartWriter, merge_parts
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import RunFailed, UserError
from k2jax.runs.records import read_records
from k2jax.train import ledger as ledger_module
from k2jax.train.ledger import Ledger

T, B = 16, 24
SIZES = {"shard_tokens": 128, "chunk_tokens": 32}


def write(folder, sources, num_parts=2, bad=None):
    """A store whose document i of a source is i + 1 times one letter; bad: (source, document) with an unknown id."""
    tokenizer = load_tokenizer("byte")
    for part in range(num_parts):
        writer = PartWriter(folder, part, tokenizer, **SIZES)
        for number, (source, count) in enumerate(sources.items()):
            for i in range(count):
                split = "validation" if i % 5 == 4 else "train"
                writer.append(split, source, f"{source}-{part}-{i}", chr(97 + number) * (i * 7 % 41 + 1))
                if bad == (source, i):
                    record = {"name": "the bad one", "bytes": 1, "sha256": "0" * 64}
                    writer.append_tokens(split, source, np.array([256, 7777, 257], np.uint32), record)
        writer.finish()
    merge_parts(folder, num_parts, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "one", {"web": 60, "code": 40}), write(folder / "two", {"wiki": 30})
    return folder


def config_of(place, **changes):
    values = {"data.path": f"{place}/one,{place}/two", "data.sequence_length": T, "data.batch_sequences": B}
    values |= {"model.vocab_size": 258, "train.eval_sequences": 4, "data.index_dir": str(place / "indexes")}
    values |= {"phases.start_tokens": (0, 7 * B * T), "mixture.weights": ("web=5 code=3 wiki=1", "web=1 wiki=2")}
    return Config().replace(values | {key.replace("__", "."): value for key, value in changes.items()})


def batches(config, start=0, places=None):
    corpus = open_data(config)
    return train_batches(corpus, settle_timeline(corpus, config)[0], config, start, places)


def take(config, count, start=0, places=None):
    return list(itertools.islice(batches(config, start, places), count))


def test_any_number_of_processes_reads_the_same(place):
    whole = take(config_of(place), 12)
    for count in (1, 2, 3, 4, 8):
        shares = [take(config_of(place), 12, 0, places) for places in np.split(np.arange(B), count)]
        for step, batch in enumerate(whole):
            for name in batch:
                assert np.array_equal(np.concatenate([share[step][name] for share in shares]), batch[name])
    scattered = np.array([3, 17, 5, 5, 23])  # any rows, such as a device's
    for step, batch in enumerate(take(config_of(place), 3, 4, scattered)):
        assert np.array_equal(batch["tokens"], whole[4 + step]["tokens"][scattered])


def row_ids(config, step, places):
    corpus = open_data(config)
    timeline = settle_timeline(corpus, config)[0]
    rows = timeline.step_rows(step)[places]
    return [[int(v) for v in values] for values in zip(rows, *timeline.locate(rows), strict=True)]


RESUME = """import json, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from test_rows import Path, config_of, open_data
from k2jax.data.loader.batches import check_position, data_position
from k2jax.data.loader.timeline import make_timeline
from k2jax.data.loader.segments import settle_timeline
saved = Path(sys.argv[1]) / sys.argv[3]
config = config_of(Path(sys.argv[1]))
corpus = open_data(config)
ids = {}
for step in range(200):
    # What a process that begins at `step` does: read the plan and the position from their files, check, go on.
    timeline = settle_timeline(corpus, config, json.loads((saved / "timeline.json").read_text()), step)[0]
    check_position(json.loads((saved / f"{step}.json").read_text()), timeline, config, step)
    rows = timeline.step_rows(step)
    ids[step] = np.stack([rows, *timeline.locate(rows)]).tolist()
    (saved / f"{step}.json").write_text(json.dumps(data_position(timeline, config, step)))
(saved / "timeline.json").write_text(json.dumps(timeline.segments))
print(json.dumps(ids))
"""


def test_resume_at_each_of_200_steps_in_a_fresh_process_twice(place):
    config = config_of(place)
    corpus = open_data(config)
    timeline = settle_timeline(corpus, config)[0]
    from k2jax.data.loader.batches import data_position

    saved = place / "saved"
    saved.mkdir()
    (saved / "timeline.json").write_text(json.dumps(timeline.segments))
    for step in range(200):
        (saved / f"{step}.json").write_text(json.dumps(data_position(timeline, config, step)))
    expected = {str(step): np.transpose(row_ids(config, step, np.arange(B))).tolist() for step in range(200)}
    for _ in range(2):
        command = [sys.executable, "-c", RESUME, str(place), str(Path(__file__).parent), "saved"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected


def test_rows_are_the_windows_of_their_sources(place):
    config = config_of(place)
    corpus = open_data(config)
    timeline = settle_timeline(corpus, config)[0]
    assert timeline.names == ["code", "web", "wiki"]
    for step, batch in enumerate(take(config, 10)):
        for place_, (_, source, _, window) in enumerate(row_ids(config, step, np.arange(B))):
            stream = corpus.streams["train"][timeline.names[source]]
            assert np.array_equal(batch["tokens"][place_], stream.read(window * T, window * T + T + 1))


def test_without_masks_a_sequence_is_one_document(place):
    on, off = (take(config_of(place, data__mask_documents=value), 3) for value in (True, False))
    for a, b in zip(on, off, strict=True):
        assert np.array_equal(a["tokens"], b["tokens"]) and a["segment_ids"].any() and not b["segment_ids"].any()
        assert (b["positions"] == np.arange(T)).all() and not (a["positions"] == b["positions"]).all()


@pytest.mark.parametrize("lengths", [[5] * 40, [17, 34, 3, 14, 9, 8, 51, 1, 1, 16], [100], [16, 1] * 9, [2], []])
def test_packing_loses_and_repeats_nothing(lengths):
    borders, size = np.cumsum([0, *lengths]), 17
    pieces, rows = pack(borders.astype(np.uint64), size)
    tokens = [
        [t for start, length in pieces[a:b] for t in range(start, start + length)] for a, b in itertools.pairwise(rows)
    ]
    assert all(len(row) == size for row in tokens)
    flat = [t for row in tokens for t in row]
    assert len({*flat}) == len(flat) == sum(lengths) // size * size or sum(lengths) - len(flat) < size
    assert len(tokens) == sum(l // size for l in lengths) + sum(l % size for l in lengths) // size
    for start, length in pieces.tolist():  # no piece has tokens of two documents
        assert np.searchsorted(borders, start, "right") == np.searchsorted(borders, start + length - 1, "right")


def test_packing_cuts_few_documents():
    """Of documents that fit into a row, at most a third as many are cut as by slicing."""
    lengths = np.random.default_rng(0).lognormal(3.5, 1, 4000).astype(int) + 2
    borders, size = np.cumsum([0, *lengths]), 257
    pieces, _ = pack(borders.astype(np.uint64), size)
    document = np.searchsorted(borders, pieces[:, 0], "right") - 1
    cut = sum(lengths[d] <= size for d, count in zip(*np.unique(document, return_counts=True)) if count > 1)
    slices = np.arange(size - 1, borders[-1], size - 1)
    sliced = sum(lengths[d] <= size for d in {*(np.searchsorted(borders, slices, "right") - 1)} if d < len(lengths))
    assert 3 * cut < sliced


def test_packed_rows_reach_the_batch(place):
    config = config_of(place, data__packing="best_fit")
    corpus = open_data(config)
    timeline = settle_timeline(corpus, config)[0]
    reader = RowReader(corpus, timeline, config)
    for step, batch in enumerate(take(config, 6)):
        for place_, (_, source, _, window) in enumerate(row_ids(config, step, np.arange(B))):
            pieces = reader.cuts[source].pieces(window)
            stream = reader.streams[source]
            row = np.concatenate([stream.read(a, b) for a, b in pieces])
            assert np.array_equal(batch["tokens"][place_], row)
            segments = np.repeat(np.arange(len(pieces)), [b - a for a, b in pieces])[:T]
            assert np.array_equal(batch["segment_ids"][place_], segments)
    files = sorted((place / "indexes").glob("*.packing"))
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:-3])  # a damaged index is made again
    assert [a["tokens"].tolist() for a in take(config, 2)] == [b["tokens"].tolist() for b in take(config, 2)]
    assert [file.read_bytes() for file in files] == before and len(files) == 6


def test_fill_in_the_middle_against_its_inverse():
    markers, edges, draw = (900, 901, 902), (256, 257), np.random.default_rng(0)
    documents = [[256, *draw.integers(0, 256, n), 257] for n in draw.integers(0, 30, 60)]
    tokens, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents[:-1])])
    padded = np.concatenate([tokens, np.full(200, 5)])  # room for the markers
    changed, new_starts = fill_in_middle(padded, starts, edges, 0.5, markers, key=77)
    assert len(changed) == len(padded)
    done = 0
    for document, start in zip(documents[:-1], new_starts, strict=False):
        found = changed[start : start + len(document) + 3].tolist()
        if found[1:2] == [900]:
            b, c = found.index(901), found.index(902)
            assert [256, *found[2:b], *found[c + 1 : -1], *found[b + 1 : c], 257] == document
            done += 1
        else:
            assert found[: len(document)] == document
    assert 15 < done < 45
    again, _ = fill_in_middle(padded, starts, edges, 0.5, markers, key=77)
    other, _ = fill_in_middle(padded, starts, edges, 0.5, markers, key=78)
    assert np.array_equal(changed, again) and not np.array_equal(changed, other)


def test_fill_in_the_middle_passes_over_empty_documents():
    tokens = np.array([256, 1, 257, 256, 5, 257], np.uint32)
    with_empty, starts = fill_in_middle(tokens, np.array([0, 3, 3]), (256, 257), 0.999, (300, 301, 302), 1)
    assert len(with_empty) == 6 and with_empty[:2].tolist() == [256, 300] and starts[0] == 0


def test_fill_in_the_middle_reaches_the_batch(place):
    changes = {"data__fim_rate": 0.9, "data__fim_tokens": (258, 259, 260), "model__vocab_size": 261}
    whole = take(config_of(place, **changes), 4)
    assert sum((batch["tokens"] == 260).sum() for batch in whole) > 40
    (tail,) = take(config_of(place, **changes), 1, 3, np.arange(9))
    assert all(np.array_equal(tail[name], whole[3][name][:9]) for name in tail)


def damaged(tmp_path, **changes):
    path = write(tmp_path / "bad", {"web": 60}, bad=("web", 33))
    return config_of(tmp_path, **{"data__path": path, "mixture__weights": ("natural",), **changes})


def test_an_unknown_id_stops_the_run_with_its_place(tmp_path):
    with pytest.raises(
        BadRow, match=r"row \d+: source web, window \d+, .* 'the bad one': .*tokens/c/\d, .*: id 7777 is not"
    ):
        take(damaged(tmp_path), 20)


def flip(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def test_bad_rows_are_replaced_alike_everywhere_and_entered(tmp_path):
    config = damaged(tmp_path, data__max_bad_rows=500)
    flip(Path(config.data.path) / "train/web/00000/tokens/c/1")
    whole = take(config, 8)
    for count in (2, 3):
        shares = [take(config, 8, 0, places) for places in np.split(np.arange(B), count)]
        for step, batch in enumerate(whole):
            for name in batch:
                assert np.array_equal(np.concatenate([share[step][name] for share in shares]), batch[name])
    corpus = open_data(config)
    timeline = settle_timeline(corpus, config)[0]
    reader, path = RowReader(corpus, timeline, config), tmp_path / "ledger.jsonl"
    every = np.arange(B)
    ledger = Ledger(path, reader, config, 0, every)
    for step, batch in enumerate(whole):
        ledger.enter(step, batch["replaced"])
        ledger.sync()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("id 7777" in entry["why"] for entry in entries) and any("sha256 is" in entry["why"] for entry in entries)
    stream = corpus.streams["train"]["web"]
    for entry in entries:
        place = entry["row"] - entry["step"] * B
        row = whole[entry["step"]]["tokens"][place]
        other = entry["replaced_by"]
        assert np.array_equal(row, stream.read(other * T, other * T + T + 1)) and row.max() < 258
        assert int(timeline.locate(entry["row"]).window) == entry["window"]
    assert len(entries) == sum((batch["replaced"] >= 0).sum() for batch in whole)
    # A resume at step 5 forgets what comes after, and the budget counts the whole run.
    again = Ledger(path, reader, config, 5, every)
    for step in range(5, 8):
        again.enter(step, whole[step]["replaced"])
    again.sync()
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries
    small = Ledger(tmp_path / "small.jsonl", reader, damaged_budget(config, 2), 0, every)
    with pytest.raises(RunFailed, match="3 bad rows by step .*: source web, .*data.max_bad_rows = 2 were allowed"):
        for step, batch in enumerate(whole):
            small.enter(step, batch["replaced"])


def test_processes_that_pass_the_budget_at_once_leave_a_ledger_that_a_resume_reads(tmp_path, monkeypatch):
    config = damaged_budget(damaged(tmp_path, data__max_bad_rows=500), 2)
    batches = take(config.replace({"data.max_bad_rows": 500}), 8)
    corpus = open_data(config)
    reader, path = RowReader(corpus, settle_timeline(corpus, config)[0], config), tmp_path / "ledger.jsonl"
    ledgers = [Ledger(path, reader, config, 0, np.arange(B)) for _ in range(3)]
    for process in (1, 0, 2):  # of a mesh whose tensor axis crosses them, so all read the same rows
        monkeypatch.setattr(ledger_module, "is_first", lambda process=process: process == 0)
        with pytest.raises(RunFailed, match="3 bad rows by step") as failed:
            for step, batch in enumerate(batches):
                ledgers[process].enter(step, batch["replaced"])
        assert f"{'all' if process == 0 else 'those until the last save'} are in {path}" in str(failed.value)
    assert len(read_records(path)) == 3
    Ledger(path, reader, config, 5, np.arange(B))


def test_a_source_that_is_bad_everywhere_says_why(tmp_path):
    config = damaged(tmp_path, data__max_bad_rows=500)
    for path in Path(config.data.path).glob("train/web/*/tokens/c/*"):
        flip(path)
    corpus = open_data(config)
    reader = RowReader(corpus, settle_timeline(corpus, config)[0], config)
    size = int(reader.timeline.windows[0])
    looked = rf"all {min(size, 64)} windows that were looked at, of {size}, are bad: a source whose one shard"
    with pytest.raises(BadRow, match=rf"^source web, window 7, .*train/web/0000./tokens/c/\d: sha256 is .*; {looked}"):
        reader._read(0, 0, 7)


def damaged_budget(config, rows):
    return config.replace({"data.max_bad_rows": rows})


def test_validation_of_one_source(place):
    config = config_of(place)
    corpus = open_data(config)
    total = num_windows(corpus, "validation", T)
    assert total == sum(num_windows(corpus, "validation", T, name) for name in ("web", "code", "wiki"))
    letters = {"web": "a", "code": "b", "wiki": "a"}
    for source, letter in letters.items():
        count = num_windows(corpus, "validation", T, source)
        rows = np.concatenate([b["tokens"] for b in validation_batches(corpus, config, count, 4, source)])
        assert {*np.unique(rows).tolist()} <= {ord(letter), 256, 257} and len(rows) == count
    rows = np.concatenate([b["tokens"] for b in validation_batches(corpus, config, total, 4)])
    assert len(rows) == total


def test_what_does_not_fit_is_named(place):
    config = config_of(place, mixture__weights=("web=5 books=3", "web=1"), mixture__epochs="web=1 words=2")
    with pytest.raises(UserError) as error:
        settle_timeline(open_data(config), config)
    assert [text.split(";")[0] for text in error.value.problems] == [
        "mixture: 'web=1 words=2': data.path has no source 'words' with a whole sequence",
        "mixture: 'web=5 books=3': data.path has no source 'books' with a whole sequence",
    ]
    with pytest.raises(UserError, match="both have a source 'web'"):
        open_corpus(f"{place}/one,{place}/one")
    with pytest.raises(UserError) as error:
        open_corpus(f"{place}/none,{place}/indexes")
    assert len(error.value.problems) == 2


def test_natural_passes_over_no_source(tmp_path):
    path = write(tmp_path / "store", {"web": 60, "wiki": 30, "code": 2}, num_parts=1)
    plain = {"data__path": path, "data__sequence_length": 60, "train__eval_sequences": 1, "phases__start_tokens": (0,)}
    config = config_of(tmp_path, **plain, mixture__weights=("natural",))
    with pytest.raises(UserError) as error:
        settle_timeline(open_data(config), config)
    assert str(error.value) == (
        "mixture: 'natural': source 'code' has 13 tokens, and no whole row of data.sequence_length + 1 = 61; "
        "lower that, or leave the source out by mixture.weights = 'web=17 wiki=8'"
    )
    config = config_of(tmp_path, **plain, mixture__weights=("web=17 wiki=8",))
    assert settle_timeline(open_data(config), config)[0].names == ["web", "wiki"]
