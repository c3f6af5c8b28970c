"""`k2jax audit` against the batches that training reads."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from test_rows import B, T, config_of, write
from token_writer import TokenWriter

from k2jax.cli.main import main
from k2jax.data.loader.batches import train_batches
from k2jax.data.loader.corpus import open_data
from k2jax.data.loader.segments import read_segments, settle_timeline, write_segments
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import UserError
from k2jax.runs.folder import RunFolder, write_config

STEPS = 12


@pytest.fixture(scope="module", params=["windows", "best_fit"])
def run(request, tmp_path_factory):
    """(a run directory as it is after step 0, its corpus and batches)."""
    folder = tmp_path_factory.mktemp("audit")
    write(folder / "one", {"web": 60, "code": 40}), write(folder / "two", {"wiki": 30})
    config = config_of(folder, data__packing=request.param, data__skip_steps=("4-5",), train__num_steps=STEPS)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(folder / "run")))
    corpus = open_data(config)
    timeline, _ = settle_timeline(corpus, config)
    (folder / "run").mkdir()
    write_config(folder / "run", config)
    write_segments(RunFolder(folder / "run").timeline, timeline.segments)
    return folder / "run", corpus, list(itertools.islice(train_batches(corpus, timeline, config, 0), STEPS))


def audit(capsys, run, *arguments):
    assert main(["audit", str(run), *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_every_row_is_made_of_the_documents_listed(run, capsys):
    folder, corpus, batches = run
    for step in (0, 3, 4, 11):
        rows = audit(capsys, folder, "--step", str(step))
        assert [row["place"] for row in rows] == list(range(B))
        for row, tokens in zip(rows, batches[step]["tokens"], strict=True):
            stream = corpus.streams["train"][row["source"]]
            found = []
            for document in row["documents"]:
                (record,) = stream.records([document["document"]])
                assert (document["name"], document["sha256"]) == (record["name"], record["sha256"])
                start = int(stream.borders(document["document"], document["document"] + 1)[0])
                found += stream.read(start + document["tokens"][0], start + document["tokens"][1]).tolist()
            assert found == tokens.tolist()
        (one,) = audit(capsys, folder, "--step", str(step), "--place", "7")
        assert one == rows[7]


def test_every_sighting_of_a_document(run, capsys):
    folder, corpus, batches = run
    listed = {step: audit(capsys, folder, "--step", str(step)) for step in range(STEPS)}
    for name in ("web-0-17", "wiki-1-8", "code-0-3"):
        expected = {
            (s, row["place"]) for s in listed for row in listed[s] for d in row["documents"] if d["name"] == name
        }
        seen = audit(capsys, folder, "--document", name)
        assert {(entry["step"], entry["place"]) for entry in seen if entry["step"] is not None} == expected
        assert expected or name == "code-0-3"
        early = audit(capsys, folder, "--document", name, "--until", "3")
        assert {(entry["step"], entry["place"]) for entry in early} == {pair for pair in expected if pair[0] < 3}
    (record,) = corpus.streams["train"]["web"].records([4])
    by_hash = audit(capsys, folder, "--document", record["sha256"][:16])
    assert by_hash and {entry["source"] for entry in by_hash} <= {"web", "wiki"}  # the same text is in both


def test_what_is_held_out_is_said_to_be(run, capsys):
    folder, corpus, _ = run
    (record,) = corpus.streams["validation"]["code"].records([1])
    expected = [{"source": "code", "document": 1, "unread": f"held out in {folder.parent}/one"}]
    assert audit(capsys, folder, "--document", record["name"]) == expected
    by_hash = audit(capsys, folder, "--document", record["sha256"][:20].upper())
    assert [entry for entry in by_hash if "unread" in entry and entry["source"] == "code"][:1] == expected
    assert main(["audit", str(folder), "--document", record["name"]]) == 0
    assert capsys.readouterr().out == f"held out in {folder.parent}/one, so no step reads it: code, document 1\n"
    wrong = record["sha256"][:63] + ("0" if record["sha256"][63] != "0" else "1")
    assert main(["audit", str(folder), "--document", wrong]) == 2
    assert "has this name or sha256" in capsys.readouterr().err


def test_options_do_not_change_what_a_run_has_read(run, capsys):
    folder, *_ = run
    assert main(["audit", str(folder), "--step", "2", "--data.seed", "4", "--mixture.weights", "web=1"]) == 2
    said = capsys.readouterr().err
    for field in (
        "data.seed = 4: the run in",
        "mixture.weights = ('web=1',): the run in",
        "or give data.validation_path",
    ):
        assert field in said


def test_held_out_elsewhere_and_names_that_look_like_a_sha256(run, capsys, tmp_path):
    folder, _, _ = run
    name = "0123456789abcdef01"
    writer = TokenWriter(tmp_path / "other", load_tokenizer("byte"), source="web")
    writer.append("train", name, "a text of that name")
    writer.finish()
    elsewhere = ("--data.validation-path", f"{tmp_path}/other")
    expected = [{"source": "web", "document": 0, "unread": f"held out in {tmp_path}/other"}]
    assert audit(capsys, folder, "--document", name, *elsewhere) == expected
    mixed = ("--data", f"{folder.parent}/one,{folder.parent}/two,{tmp_path}/other")
    (found,) = audit(capsys, folder, "--document", name, *mixed)
    assert found["unread"] == f"of a source in {tmp_path}/other that the mixture does not have"


def test_the_account(run, capsys):
    folder, corpus, _ = run
    windows = {
        name: entry["windows"] for name, entry in read_segments(RunFolder(folder).timeline)[0]["sources"].items()
    }
    for until in (1, 6, STEPS):
        listed = [row["source"] for step in range(until) for row in audit(capsys, folder, "--step", str(step))]
        account = {e["source"]: e for e in audit(capsys, folder, "--tokens", "--until", str(until))}
        assert {name: entry["tokens"] for name, entry in account.items()} == {
            name: listed.count(name) * T for name in account
        }
        skipped = 2 * B if until > 4 else 0
        assert sum(entry["skipped_rows"] for entry in account.values()) == skipped
        assert sum(entry["share"] for entry in account.values()) == pytest.approx(1)
        assert sum(entry["planned_share"] for entry in account.values()) == pytest.approx(1)
        for name, entry in account.items():
            assert entry["share"] == pytest.approx(listed.count(name) / len(listed))
            assert entry["epochs"] * windows[name] == pytest.approx(listed.count(name))
            assert (
                abs(entry["share"] - entry["planned_share"]) * until * B < 3
            )  # one row at each border of what is read


def test_before_the_run_and_from_another_machine(run, capsys, tmp_path):
    """A config alone, and a run whose stores have moved, answer as the run."""
    folder, _, _ = run
    expected = audit(capsys, folder, "--step", "8")
    config = json.loads((folder / "config.json").read_text())
    fields = {f"{s}.{k}": v for s in ("data", "mixture", "phases", "train") for k, v in config[s].items()}
    fields |= {"model.vocab_size": 258, "train.run_dir": str(tmp_path / "none")}
    file = tmp_path / "config.py"
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    file.write_text(f"from k2jax.config import Config\n\ndef config():\n    return Config().replace({values!r})\n")
    assert audit(capsys, file, "--step", "8") == expected
    (folder.parent / "one").rename(folder.parent / "moved")
    try:
        places = f"{folder.parent}/moved,{folder.parent}/two"
        assert audit(capsys, folder, "--step", "8", "--data", places) == expected
    finally:
        (folder.parent / "moved").rename(folder.parent / "one")


def test_for_people_and_refusals(run, capsys):
    folder, _, _ = run
    assert main(["audit", str(folder), "--tokens"]) == 0
    assert "web: " in (out := capsys.readouterr().out) and "passes" in out
    assert main(["audit", str(folder), "--step", "0"]) == 0 and "tokens 0-" in capsys.readouterr().out
    assert main(["audit", str(folder), "--document", "web-0-0"]) == 0
    for arguments, message in (
        (["--step", "12"], "the run has steps 0 to 11; nearest: 11"),
        (["--document", "nobody"], "no document of"),
        (["--tokens", "--until", "-3"], "--until -3: must be at least 0"),
        (["--step", "1", "--place", "99"], "--place 99: a batch has rows 0 to"),
        (["--tokens", "--place", "3"], "--place 3: goes with --step alone"),
        (["--step", "1", "--until", "3"], "--until 3: does not go with --step"),
        (["--place", "3", "--until", "-3"], "3 problems\n"),
        ([], "give one of --step N, --document ID and --tokens"),
        (["--step", "1", "--tokens"], "give one of"),
    ):
        assert main(["audit", str(folder), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_arrays_are_not_needed_to_find_rows(run):
    """Row ids come from timeline.json alone: no store is opened."""
    from k2jax.data.loader.timeline import make_timeline
    from k2jax.runs.folder import read_config

    folder, corpus, _ = run
    timeline = make_timeline(read_segments(RunFolder(folder).timeline), read_config(folder))
    place = timeline.locate(timeline.step_rows(5))
    assert np.array_equal(
        place.window, settle_timeline(corpus, read_config(folder))[0].locate(timeline.step_rows(5)).window
    )


def test_user_errors_of_a_lost_store(run):
    from k2jax.data.loader.corpus import open_corpus
    from k2jax.data.loader.rows import RowReader
    from k2jax.runs.folder import read_config

    folder, corpus, _ = run
    config = read_config(folder)
    reader = RowReader(open_corpus(f"{folder.parent}/two"), settle_timeline(corpus, config)[0], config)
    with pytest.raises(UserError, match="source 'code' of the store with digest .* is not in"):
        reader.read_window(0, 0)
