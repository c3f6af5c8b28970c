"""Finding and reading files: every kind, packed or not, here or behind a URL, gives the same records."""

import gzip
import json
import os

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from k2jax.data.text.readers import PART_BYTES, Record, records
from k2jax.data.text.sources import Tally, find_files, source_and_path

ORIGIN = {"source": "wiki", "name": "a.jsonl:3", "sha256": "0123456789abcdef" * 4}
VALUES = [{"text": "one é"}, {"text": "", "more": [1]}, {"text": "three\u2028\n", "origin": ORIGIN}]
EXPECTED = [("one é", None), ("", None), ("three\u2028\n", ORIGIN)]


def pack(suffix):
    lines = "".join(json.dumps(value) + "\n" for value in VALUES).encode()
    if suffix == "jsonl.gz":
        return gzip.compress(lines)
    if suffix == "jsonl.zst":  # in two frames, as appended files have
        return b"".join(zstandard.compress(part) for part in (lines[:20], lines[20:]))
    if suffix == "parquet":
        table = pyarrow.table({key: [value.get(key) for value in VALUES] for key in ("origin", "text")})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, row_group_size=2)
        return sink.getvalue().to_pybytes()
    return lines


def read(specs, pattern="**/*", exclude=(), text_field="text"):
    skipped, bad = Tally(), Tally(num_examples=10)
    files = find_files([str(spec) for spec in specs], pattern, exclude, skipped)
    return files, [r for f in files for r in records(f, text_field, skipped, bad)], skipped.reasons, bad.reasons


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "JSONL", "parquet"])
@pytest.mark.parametrize("alone", [True, False])
def test_every_kind_gives_the_same_records(tmp_path, suffix, alone):
    path = tmp_path / f"in/deep/docs.{suffix}"
    path.parent.mkdir(parents=True)
    path.write_bytes(pack(suffix))
    files, found, skipped, bad = read([f"wiki={path}" if alone else f"wiki={tmp_path}"])
    name = path.name if alone else f"in/deep/{path.name}"
    assert found == [Record(f"{name}:{number}", *pair) for number, pair in enumerate(EXPECTED, 1)]
    assert [(f.source, f.size, f.alone) for f in files] == [("wiki", path.stat().st_size, alone)]
    assert (skipped, bad) == ({}, {})


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_urls(suffix):
    """The file system that fsspec keeps in memory; s3:// and gs:// differ by the package that fsspec names."""
    system = fsspec.filesystem("memory")
    system.pipe(f"/bucket/in/docs.{suffix}", pack(suffix))
    system.pipe("/bucket/other.md", b"text")
    try:
        for url, name in (
            ("memory://bucket", f"in/docs.{suffix}"),
            (f"memory://bucket/in/docs.{suffix}", f"docs.{suffix}"),
        ):
            files, found, skipped, bad = read([url], pattern=f"**/*.{suffix}")
            assert found == [Record(f"{name}:{number}", *pair) for number, pair in enumerate(EXPECTED, 1)]
            assert len(files) == 1 and files[0].size > 0 and files[0].stamp and files[0].path.startswith("memory://")
    finally:
        system.rm("/bucket", recursive=True)


def test_code_trees(tmp_path):
    for name in ("b/x.py", "a.py", "b/y.md", ".git/config", "b/.hg/store", "c/latin.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xe9" if "latin" in name else name.encode())
    os.symlink(tmp_path / "b", tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "gone")
    _, found, skipped, bad = read([tmp_path], exclude=("**/*.md",))
    assert found == [Record("a.py", "a.py", None), Record("b/x.py", "b/x.py", None)]
    assert {reason: entry["examples"] for reason, entry in skipped.items()} == {
        "version control": [f"{tmp_path}/.git", f"{tmp_path}/b/.hg"],
        "link to a folder": [f"{tmp_path}/link"],
        "excluded": ["b/y.md"],
        "not a file": ["gone"],
        "not UTF-8": ["c/latin.py"],
    }


def test_a_text_named_by_itself_comes_in_parts(tmp_path):
    line = "é" * 3000 + "\n"
    (tmp_path / "book.txt").write_text(line * 9)
    for path, content in (("book.txt", None), ("book.txt.gz", gzip.compress((line * 9).encode()))):
        if content:
            (tmp_path / path).write_bytes(content)
        _, found, _, _ = read([tmp_path / path])
        assert "".join(r.text for r in found) == line * 9 and [r.text for r in found] == [line * 3] * 3
        assert [r.name for r in found] == [f"{path}@{i * 3 * len(line.encode())}" for i in range(3)]
        assert 3 * len(line.encode()) > PART_BYTES


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_damaged_files_are_bad_and_never_just_shorter(tmp_path, suffix):
    content = pack(suffix) if suffix != "jsonl.zst" else zstandard.compress(pack("jsonl"))
    for number in range(8, len(content) - 1, max(1, len(content) // 12)):
        (tmp_path / f"cut.{suffix}").write_bytes(content[:number])
        _, found, _, bad = read([tmp_path / f"cut.{suffix}"])
        assert bad, f"{number} of {len(content)} bytes"


def test_bad_values(tmp_path):
    wrong = ["0", 5, {**ORIGIN, "sha256": "0"}, {**ORIGIN, "name": ""}, {"sha256": ORIGIN["sha256"]}]
    lines = [json.dumps({"text": "x", "origin": origin}) for origin in wrong] + ['{"text": null}', "3"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), tmp_path / "b.parquet")
    _, found, skipped, bad = read([tmp_path])
    origin = "'origin' must have 'source', 'name' and 'sha256' of the text that this one rephrases"
    path = f"{tmp_path}/a.jsonl"
    assert found == [] and bad["line"]["examples"] == [
        *(f"{path}:{number}: {origin}" for number in range(1, 6)),
        f"{path}:7: is not a JSON object; fix or remove the line",
    ]
    assert skipped == {"null text": {"count": 1, "examples": ["a.jsonl:6"]}}
    rule = "has no column 'text'; its columns are body, title; name the text's by --text-field"
    assert bad["file"]["examples"] == [f"{tmp_path}/b.parquet: {rule}"]


@pytest.mark.parametrize(
    "pattern, names",
    [("**/*.{py,md}", "a.py b/c.md"), ("{a,b/*}.*", "a.py b/c.md b/c.txt"), ("*{", "{"), ("?{a,*}x}", "{}x}"),
     ("**/{c.t,a.}*", "a.py b/c.txt"), ("b/**", "b/c.md b/c.txt"), ("*", "a.py { {}x}")],
)  # fmt: skip
def test_patterns(tmp_path, pattern, names):
    for name in ("a.py", "b/c.md", "b/c.txt", "{", "{}x}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in read([tmp_path], pattern)[0]] == names.split()


@pytest.mark.parametrize(
    "spec, expected",
    [("a/b", ("text", "a/b")), ("wiki=a/b", ("wiki", "a/b")), ("./a=b", ("text", "./a=b")), ("x=y=z", ("x", "y=z")),
     ("s3://bucket/a=b", ("text", "s3://bucket/a=b")), ("w.1-x=s3://b", ("w.1-x", "s3://b"))],
)  # fmt: skip
def test_names_of_sources(spec, expected):
    assert source_and_path(spec) == expected
