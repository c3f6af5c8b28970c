"""Preparing documents: what goes in, on which side, what is left out, and what is refused."""

import hashlib
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from k2jax.data.store.reader import TokenStore
from k2jax.data.text import prepare as prepare_module
from k2jax.data.text import tasks
from k2jax.data.text.prepare import prepare
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """40 different files, and one of each kind that is left out."""
    source = tmp_path / "source"
    (source / "sub/deep").mkdir(parents=True)
    for i in range(40):
        (source / ("sub" if i % 2 else "sub/deep") / f"{i:02}.txt").write_bytes(f"document {i}\r\né".encode())
    (source / "sub/latin.txt").write_bytes(b"caf\xe9")
    (source / "sub/nothing.txt").write_bytes(b"")
    (source / "sub/zcopy.txt").write_bytes("document 1\r\né".encode())
    (source / "other.py").write_text("print()")
    return source


def documents(store, split):
    """(name, text) as stored, by source."""
    tokenizer, found = store.tokenizer(), []
    for stream in store.streams[split].values():
        borders = stream.borders(0, stream.num_documents).tolist() if stream.num_documents else [0]
        rows = [stream.read(a, b) for a, b in itertools.pairwise(borders)]
        assert all(row[0] == tokenizer.bos and row[-1] == tokenizer.eos for row in rows)
        names = [record["name"] for record in stream.records([*range(stream.num_documents)])]
        found += zip(names, (tokenizer.decode(row[1:-1]) for row in rows), strict=True)
    return found


def counts(store, split):
    return store.manifest["splits"][split]


def is_validation(text, fraction):
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def refused(*args, **kwargs):
    with pytest.raises(UserError) as error:
        prepare(*args, **kwargs)
    return error.value.problems


def test_folder(tree, tmp_path):
    calls = []
    summary = prepare(
        str(tree), str(tmp_path / "out"), "byte", pattern="**/*.txt", exclude=("sub/deep/0?.txt",),
        validation_fraction=0.3, progress=lambda *numbers: calls.append(numbers), shard_tokens=64, chunk_tokens=16,
    )  # fmt: skip
    store = TokenStore(tmp_path / "out")
    kept = [f"sub/{i:02}.txt" for i in range(1, 40, 2)] + [f"sub/deep/{i}.txt" for i in range(10, 40, 2)]
    expected = [(name, (tree / name).read_bytes().decode()) for name in kept]
    for split, side in (("train", False), ("validation", True)):
        assert documents(store, split) == [pair for pair in expected if is_validation(pair[1], 0.3) == side]
        assert counts(store, split)["text_bytes"] == sum(
            len(t.encode()) for _, t in expected if is_validation(t, 0.3) == side
        )
    assert summary["skipped"] == store.manifest["skipped"] == {
        "excluded": {"count": 5, "examples": [f"sub/deep/0{i}.txt" for i in (0, 2, 4, 6, 8)]},
        "not UTF-8": {"count": 1, "examples": ["sub/latin.txt"]},
        "empty": {"count": 1, "examples": ["sub/nothing.txt"]},
        "duplicate": {"count": 1, "examples": ["sub/zcopy.txt"]},
    }  # fmt: skip
    written = [p for (p,) in calls if p.task == "write"][-1]
    sizes = [sum(counts(store, s)[key] for s in ("train", "validation")) for key in ("text_bytes", "tokens")]
    assert (written.documents, written.text_bytes, written.tokens, written.ranks) == (35, *sizes, (1, 1))
    assert written.file_bytes[0] == written.file_bytes[1] > 35
    assert summary["digest"] == store.digest and summary["splits"] == store.manifest["splits"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_sides_do_not_depend_on_order_or_company(tree, tmp_path):
    sides = []
    for out, source in (("a", [str(tree)]), ("b", [str(tree / "sub/deep"), str(tree / "other.py"), str(tree)])):
        prepare(source, str(tmp_path / out), "byte", validation_fraction=0.3)
        store = TokenStore(tmp_path / out)
        sides.append({split: {text for _, text in documents(store, split)} for split in ("train", "validation")})
    assert sides[0] == sides[1] and not sides[0]["train"] & sides[0]["validation"]


def test_pattern_and_links(tree, tmp_path):
    (tree / "link").symlink_to(tree / "sub")
    (tree / "gone").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "fifo")
    problems = refused(str(tree), str(tmp_path / "out"), "byte", pattern="*")
    assert problems == (  # only other.py is at the top
        f"source = {str(tree)!r}: holds one document (left out: 1 link to a folder, 2 not a file), but training and "
        "validation need one each; split it into files, or into the lines of a .jsonl",
    )


def test_jsonl(tmp_path):
    lines = [{"body": f"text {i} é"} for i in range(30)]
    lines += [{"body": ""}, {"body": "text 3 é", "x": 1}, {"body": "\ud800"}]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    summary = prepare(str(path), str(tmp_path / "out"), "byte", validation_fraction=0.3, text_field="body")
    store = TokenStore(tmp_path / "out")
    pairs = [(f"docs.jsonl:{i + 1}", f"text {i} é") for i in range(30)]
    assert documents(store, "train") == [pair for pair in pairs if not is_validation(pair[1], 0.3)]
    assert documents(store, "validation") == [pair for pair in pairs if is_validation(pair[1], 0.3)]
    assert summary["skipped"] == {
        "empty": {"count": 1, "examples": ["docs.jsonl:31"]},
        "duplicate": {"count": 1, "examples": ["docs.jsonl:32"]},
        "not UTF-8": {"count": 1, "examples": ["docs.jsonl:33"]},
        "empty line": {"count": 1, "examples": ["docs.jsonl:34"]},
    }


def test_bad_jsonl_lines_are_all_counted(tmp_path):
    good = [json.dumps({"text": f"good {i}"}) for i in range(20)]
    bad = ["{", "[1]", '{"text": 3}', '{"body": "x"}', "\udcff"] + ["nope"] * 7
    path = tmp_path / "docs.jsonl"
    path.write_bytes("\n".join(good + bad).encode("utf-8", "surrogateescape"))
    problems = refused(str(path), str(tmp_path / "out"), "byte", validation_fraction=0.3)
    assert problems[0].startswith(f"{path}:21: is not JSON (") and problems[0].endswith("); fix or remove the line")
    rules = ["is not a JSON object; fix or remove the line", "the text is of type float, must be a string",
             "has no field 'text'; fix or remove the line", "is not UTF-8; fix or remove the line"]  # fmt: skip
    assert problems[1:5] == tuple(f"{path}:{n}: {rule}" for n, rule in enumerate(rules, 22))
    assert problems[10:] == (
        "and 2 more bad lines, 12 in all", "12 bad lines; or leave them out by --skip-bad-lines N"
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl"]


def test_a_url_to_write_to_is_refused(tree, tmp_path, monkeypatch):
    """It would become a folder called s3: in the current one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must be a folder, not a URL"):
        prepare(str(tree), "s3://bucket/store", "byte")
    assert not [*tmp_path.glob("s3*")]


def test_every_wrong_argument_at_once(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    problems = refused(str(tmp_path / "none"), str(tmp_path / "out"), "bite", validation_fraction=2)
    assert problems == (
        f"source = '{tmp_path}/none': no such file or folder",
        f"out = '{tmp_path}/out': exists already; name a new folder, or remove this one",
        "validation_fraction = 2: must be above 0 and below 1; 0.02 is usual",
        "tokenizer = 'bite': no such file; must be 'byte', 'train:VOCAB' (in prepare), the path of a .tiktoken file "
        "or of tiktoken.model, or the path of a tokenizer.json; nearest: 'byte'",
    )
    assert (tmp_path / "out/mine").read_text() == "kept"
    assert refused([], str(tmp_path / "new"), "train:9")[0] == "source: is an empty list; name a folder or a file"
    assert refused(str(tree), str(tree / "out"), "byte") == (
        f"out = '{tree}/out': must not lie inside source = '{tree}'; name a folder outside",
    )
    (tmp_path / "file").write_text("")
    problems = refused(str(tree), str(tmp_path / "file/out"), "byte")
    assert problems[0].startswith(f"out = '{tmp_path}/file/out': cannot be made: ")


def test_no_document_or_a_side_without(tree, tmp_path):
    out = str(tmp_path / "out")
    assert refused(str(tree), out, "byte", pattern="**/*.md") == (
        f"source = {str(tree)!r}: no document matches pattern = '**/*.md'; change one of them",
    )
    problems = refused(str(tree / "sub/latin.txt"), out, "train:300")
    assert problems[0].endswith("latin.txt': holds no document (left out: 1 not UTF-8); name other files")
    texts = [(tree / f"sub/{i:02}.txt").read_bytes().decode() for i in range(1, 40, 2)]
    places = sorted(int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64 for t in texts)
    rule = f"for these documents it must be above {places[0]:.6g} and at most {places[-1]:.6g}"
    options = {"pattern": "sub/*.txt", "exclude": ("**/latin*", "**/nothing*", "**/z*")}
    for fraction, empty in ((1e-6, "validation"), (0.999999, "train")):
        assert refused(str(tree), out, "byte", validation_fraction=fraction, **options) == (
            f"validation_fraction = {fraction}: leaves none of 20 documents for {empty}; {rule}",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_trained_on_the_training_split_alone(tree, tmp_path, monkeypatch):
    seen, real = [], tasks.train_bpe
    monkeypatch.setattr(tasks, "train_bpe", lambda texts, vocab: real((seen.append(t) or t for t in texts), vocab))
    summary = prepare(str(tree), str(tmp_path / "out"), "train:280", validation_fraction=0.3)
    store = TokenStore(tmp_path / "out")
    assert seen == [text for _, text in documents(store, "train")] and len(documents(store, "validation")) > 3
    assert summary["tokenizer"]["spec"] == "train:280" and 258 < summary["tokenizer"]["vocab_size"] <= 280
    assert load_tokenizer(str(tmp_path / "out/tokenizer.json")).digest == store.manifest["tokenizer"]["digest"]


CHILD = """
import sys, time
from k2jax.data.text.prepare import prepare
print("ready", flush=True)
started = time.process_time()
summary = prepare(sys.argv[1], sys.argv[2], "train:400", validation_fraction=0.3, rank_bytes=3000, shard_tokens=1024,
                  chunk_tokens=256)
print(time.process_time() - started, summary["digest"], flush=True)
"""


@pytest.fixture
def lines(tmp_path):
    """Twelve files of 40 documents, every tenth of them there twice."""
    (tmp_path / "lines").mkdir()
    for number in range(12):
        texts = [f"text {number} {i - i % 10 // 9} " + "word " * (i % 30) for i in range(40)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "lines" / f"{number:02}.jsonl").write_text(content)
    return tmp_path / "lines"


def cpu_seconds(pid):
    """Of a process, or None once it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] == b"Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return None


def start(*arguments):
    child = subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def all_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_five_times_and_resumed_is_byte_identical(lines, tmp_path):
    """SIGKILL at random moments of its own CPU time, so that other load does not move them."""
    out, rng = tmp_path / "out", random.Random(time.time_ns())
    seconds, digest = start(lines, tmp_path / "whole").communicate()[0].split()
    for number in range(5):
        child = start(lines, out)
        target = cpu_seconds(child.pid) + rng.uniform(0, float(seconds) / 6)
        while (now := cpu_seconds(child.pid)) is not None and now < target:
            time.sleep(0.001)
        child.kill()
        child.wait(), child.stdout.close()
        assert child.returncode == -signal.SIGKILL and not out.exists(), f"kill {number}"
        with pytest.raises(UserError, match="no such folder"):
            TokenStore(out)
    assert start(lines, out).communicate()[0].split()[1] == digest
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines", "out", "whole"]


def test_an_interrupted_one_goes_on_and_only_as_it_began(lines, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    options = {"validation_fraction": 0.3, "rank_bytes": 3000}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(tasks._TASKS, "merge", interrupt)
        prepare(str(lines), str(tmp_path / "out"), "byte", **options)
    work = tmp_path / ".out.k2jax-partial"
    before = {path: path.stat().st_mtime_ns for path in (work / "write").glob("*")}
    assert len(before) > 5 and not (tmp_path / "out").exists()
    (lines / "03.jsonl").write_text('{"text": "another"}')
    problems = refused(str(lines), str(tmp_path / "out"), "byte", **{**options, "validation_fraction": 0.2})
    assert problems == (
        "validation_fraction = 0.2: was 0.3 when it began",
        f"source: 1 of its files are not as they were, such as {lines}/03.jsonl",
        f"an unfinished preparation is in {work}; repeat it as it was, or remove the folder to start again",
    )
    assert {path: path.stat().st_mtime_ns for path in (work / "write").glob("*")} == before


def test_files_in_another_order_are_said_to_be(lines, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    specs = [f"a={lines}/00.jsonl", f"b={lines}/01.jsonl"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(tasks._TASKS, "merge", interrupt)
        prepare(specs, str(tmp_path / "out"), "byte", validation_fraction=0.3)
    problems = refused(specs[::-1], str(tmp_path / "out"), "byte", validation_fraction=0.3)
    assert problems[1] == "source: its files come in another order, or number, than they did"


def test_another_process_is_not_disturbed(tree, tmp_path):
    out = tmp_path / "out"
    with prepare_module._work_folder(out):
        assert refused(str(tree), str(out), "byte", validation_fraction=0.3) == (
            f"out = '{out}': another prepare is writing it; wait for it, or name another folder",
        )


def test_a_source_that_changes_meanwhile_is_noticed(tree, tmp_path, monkeypatch):
    real = tasks._TASKS["resolve"]

    def change(recipe, work, *rest):
        (tree / "sub/01.txt").write_text("document X")
        real(recipe, work, *rest)

    monkeypatch.setitem(tasks._TASKS, "resolve", change)
    problems = refused(str(tree), str(tmp_path / "out"), "byte", validation_fraction=0.3)
    assert problems == (f"{tree}/sub/01.txt: has changed while it was being prepared; start again",)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("rank_bytes, parts", [(1, 42), (100, 6), (2**26, 1)])
def test_the_cut_into_ranks_changes_no_document(tree, tmp_path, rank_bytes, parts):
    options = {"pattern": "**/*.txt", "validation_fraction": 0.3, "shard_tokens": 64, "chunk_tokens": 16}
    prepare(str(tree), str(tmp_path / "one"), "byte", **options)
    prepare(str(tree), str(tmp_path / "other"), "byte", **options, rank_bytes=rank_bytes)
    one, other = TokenStore(tmp_path / "one"), TokenStore(tmp_path / "other")
    for split in ("train", "validation"):
        assert documents(one, split) == documents(other, split) and counts(one, split) == counts(other, split)
    assert one.manifest["skipped"] == other.manifest["skipped"]
    assert len([*(tmp_path / "other/parts").iterdir()]) == parts


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def origin_of(text, source="wiki", name="x"):
    return {"source": source, "name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_variants_are_on_the_side_of_their_source(tmp_path):
    """Two of each but the first, in a source of their own, whatever the order."""
    originals = [f"text number {i}" for i in range(200)]
    values = [{"text": f"{text} told anew {n}", "origin": origin_of(text, name=f"n{i}")}
              for n in range(2) for i, text in enumerate(originals) if (i, n) != (0, 1)]  # fmt: skip
    specs = [
        "anew=" + write_lines(tmp_path / "variants.jsonl", values),
        "wiki=" + write_lines(tmp_path / "originals.jsonl", [{"text": text} for text in originals]),
    ]
    prepare(specs, str(tmp_path / "out"), "byte", validation_fraction=0.3, rank_bytes=1)
    store, sides = TokenStore(tmp_path / "out"), []
    for split in ("train", "validation"):
        texts = {text for _, text in documents(store, split)}
        sides.append({text.partition(" told")[0] for text in texts})
        assert len(texts) == 3 * len(sides[-1]) - (originals[0] in sides[-1]) > 60
        anew = store.streams[split]["anew"]
        records = anew.records([*range(anew.num_documents)])
        for record, (_, text) in zip(records, documents(store, split)[: len(records)], strict=True):
            original = text.partition(" told")[0]
            name, sha256 = f"n{original.rpartition(' ')[2]}", origin_of(original)["sha256"]
            assert record["origin"] == {"name": name, "sha256": sha256}
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(originals)
    assert [(s, store.sources[s]["derived_from"], store.sources[s]["variants"]) for s in ("anew", "wiki")] == [
        ("anew", "wiki", 2), ("wiki", None, 0)
    ]  # fmt: skip


def test_variants_must_have_a_source_of_their_own(tmp_path):
    mixed = [{"text": "a"}, {"text": "b", "origin": origin_of("a")}, {"text": "c", "origin": origin_of("a")}]
    both = [{"text": f"d{s}", "origin": origin_of("a", s)} for s in ("wiki", "books")]
    specs = [f"{n}=" + write_lines(tmp_path / f"{n}.jsonl", v) for n, v in (("mixed", mixed), ("both", both))]
    assert refused(specs, str(tmp_path / "out"), "byte", validation_fraction=0.5) == (
        "source 'mixed': 2 of 3 documents are rephrased; give them a source of their own, as mixed-rephrased=PATH",
        "source 'both': is rephrased from books, wiki; give the variants of each a source of their own",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.jsonl", "mixed.jsonl"]


def test_length_and_wrong_options(tree, tmp_path):
    summary = prepare(str(tree), str(tmp_path / "out"), "byte", pattern="**/*.txt", validation_fraction=0.3,
                      min_chars=14, max_chars=14)  # fmt: skip
    assert summary["skipped"]["length: below 14 characters"]["count"] == 11  # document 0 to 9, and a copy of one
    assert refused(str(tree), str(tmp_path / "new"), "byte", min_chars=0, max_chars=-1, filters=("repetitive",),
                   near_duplicates=0.5, executor="cluster", workers=0) == (
        "min_chars = 0: must be at least 1",
        "max_chars = -1: must be at least min_chars = 0",
        "filters: 'repetitive' must be one of repetition, quality",
        "near_duplicates = 0.5: must be at least 0.7 and at most 1, a Jaccard similarity; 0.8 is usual",
        "executor = 'cluster': must be one of local, slurm, ray",
    )  # fmt: skip


def test_without_the_extra_what_needs_it_is_named(tree, tmp_path, monkeypatch):
    (tree / "a.parquet").write_bytes(b"")
    (tree / "b.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extra = "pip install 'k2jax[data]'"
    assert refused(str(tree), str(tmp_path / "out"), "byte", filters=("quality",), near_duplicates=0.8, workers=2) == (
        f"filters = ['quality']: needs datatrove; {extra}",
        f"near_duplicates = 0.8: needs rensa; {extra}",
        f"executor = 'local' with workers = 2: needs datatrove; {extra}",
    )
    assert refused(["s3://bucket/a", "s3://bucket/b"], str(tmp_path / "out"), "byte") == tuple(
        f"source = 's3://bucket/{name}': a URL needs fsspec; {extra}" for name in "ab"
    )
    assert refused(str(tree), str(tmp_path / "out"), "byte") == (
        f"source: 1 files like '{tree}/a.parquet' need pyarrow; {extra}",
        f"source: 1 files like '{tree}/b.jsonl.zst' need zstandard; {extra}",
    )
    prepare(str(tree), str(tmp_path / "out"), "byte", pattern="**/*.txt", validation_fraction=0.3)
