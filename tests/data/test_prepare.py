"""Preparing documents: what goes in, on which side, what is left out, and what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from k2jax.config import UserError
from k2jax.data.prepare import prepare
from k2jax.data.tokenizer import load_tokenizer
from k2jax.data.tokens import TokenStore


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
    """(name, text) as stored."""
    tokenizer, borders = store.tokenizer(), store.borders(split).tolist()
    names = [json.loads(line)["name"] for line in (store.path / split / "documents.jsonl").read_text().splitlines()]
    rows = [store.read(split, a, b) for a, b in zip(borders, borders[1:])]
    assert all(row[0] == tokenizer.bos and row[-1] == tokenizer.eos for row in rows)
    return list(zip(names, (tokenizer.decode(row[1:-1]) for row in rows), strict=True))


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
        assert store.text_bytes(split) == sum(len(t.encode()) for _, t in expected if is_validation(t, 0.3) == side)
    assert summary["skipped"] == store.manifest["skipped"] == {
        "excluded": {"count": 5, "examples": [f"sub/deep/0{i}.txt" for i in (0, 2, 4, 6, 8)]},
        "not UTF-8": {"count": 1, "examples": ["sub/latin.txt"]},
        "empty": {"count": 1, "examples": ["sub/nothing.txt"]},
        "duplicate": {"count": 1, "examples": ["sub/zcopy.txt"]},
    }  # fmt: skip
    assert calls[-1] == (35, sum(store.text_bytes(s) for s in ("train", "validation"))) and len(calls) == 35
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
    rule = "must be a JSON object whose field 'text' is text"
    assert problems[0].startswith(f"{path}:21: is not JSON (") and problems[0].endswith("); mend or remove the line")
    assert problems[1:4] == tuple(f"{path}:{n}: {rule}" for n in (22, 23, 24))
    assert problems[4] == f"{path}:25: is not UTF-8; mend or remove the line"
    assert len(problems) == 11 and problems[10] == "12 bad lines in all; the first 10 are above"
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl"]


def test_every_wrong_argument_at_once(tree, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    problems = refused(str(tmp_path / "none"), str(tmp_path / "out"), "bite", validation_fraction=2)
    assert problems == (
        f"source = '{tmp_path}/none': no such file or folder",
        f"out = '{tmp_path}/out': exists already; name a new folder, or remove this one",
        "validation_fraction = 2: must be above 0 and below 1; 0.02 is usual",
        "tokenizer = 'bite': no such file; must be 'byte', 'train:VOCAB' (in prepare), the path of a .tiktoken file, "
        "or the path of a tokenizer.json; nearest: 'byte'",
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
    assert problems[0].endswith("(left out: 1 not UTF-8); change one of them")
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
    seen, module = [], sys.modules["k2jax.data.prepare"]
    real = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, vocab: real((seen.append(t) or t for t in texts), vocab))
    summary = prepare(str(tree), str(tmp_path / "out"), "train:280", validation_fraction=0.3)
    store = TokenStore(tmp_path / "out")
    assert seen == [text for _, text in documents(store, "train")] and len(documents(store, "validation")) > 3
    assert summary["tokenizer"]["spec"] == "train:280" and 258 < summary["tokenizer"]["vocab_size"] <= 280
    assert load_tokenizer(str(tmp_path / "out/tokenizer.json")).digest == store.manifest["tokenizer"]["digest"]


CHILD = """
import sys, time
from k2jax.data.prepare import prepare
def progress(documents, text_bytes):
    if documents == 20:
        print("here", flush=True)
        time.sleep(60)
prepare(sys.argv[1], sys.argv[2], "byte", validation_fraction=0.3, progress=progress, shard_tokens=64, chunk_tokens=16)
"""


def test_kill_leaves_no_store_and_the_next_prepare_goes_ahead(tree, tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.k2jax-partial"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tree), str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    assert (partial / "train/tokens/c/0").exists() and not out.exists()
    assert refused(str(tree), str(out), "byte", validation_fraction=0.3) == (
        f"out = '{out}': another prepare is writing it; wait for it, or name another folder",
    )
    child.send_signal(signal.SIGKILL)
    child.wait(), child.stdout.close()
    assert partial.exists() and not out.exists()
    with pytest.raises(UserError, match="no such folder"):
        TokenStore(out)
    (partial / "train/stale").write_text("of the killed one")
    prepare(str(tree), str(out), "byte", validation_fraction=0.3)
    assert not partial.exists() and not (out / "train/stale").exists()
    prepare(str(tree), str(tmp_path / "fresh"), "byte", validation_fraction=0.3)
    assert TokenStore(out).digest == TokenStore(tmp_path / "fresh").digest


def test_an_error_on_the_way_leaves_nothing(tree, tmp_path):
    def stop(documents, text_bytes):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tree), str(tmp_path / "out"), "byte", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and time.monotonic() - started < 10


def test_a_text_named_by_itself_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(20_000)) + "no line end"
    (tmp_path / "book.txt").write_text(text)
    prepare(str(tmp_path / "book.txt"), str(tmp_path / "out"), "byte", validation_fraction=0.2)
    store = TokenStore(tmp_path / "out")
    found = [pair for split in ("train", "validation") for pair in documents(store, split)]
    parts = sorted(found, key=lambda pair: int(pair[0].removeprefix("book.txt@")))
    assert "".join(part for _, part in parts) == text
    assert all(part.endswith("\n") and 2**14 <= len(part) < 2**14 + 40 for _, part in parts[:-1])
    assert all(text[int(name.removeprefix("book.txt@")) :].startswith(part) for name, part in parts)


def test_one_bad_byte_loses_one_part(tmp_path):
    text = bytearray("".join(f"line {i} of a long text\n" for i in range(20_000)).encode())
    text[100_000] = 0xFF
    (tmp_path / "book.txt").write_bytes(text)
    summary = prepare(str(tmp_path / "book.txt"), str(tmp_path / "out"), "byte", validation_fraction=0.2)
    assert summary["skipped"]["not UTF-8"]["count"] == 1
    kept = sum(counts["text_bytes"] for counts in summary["splits"].values())
    assert len(text) - 2**14 - 40 < kept < len(text) - 2**14 + 40
