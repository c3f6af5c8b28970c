"""Kinds of file by suffix: read, refused by name, or recognised by content; nothing is taken for what it is not."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from k2jax.data.store.reader import TokenStore
from k2jax.data.text.prepare import prepare
from k2jax.data.text.readers import PART_BYTES, WHOLE_BYTES, records
from k2jax.data.text.sources import Tally, find_files
from k2jax.errors import UserError

LINES = "".join(json.dumps({"text": f"note {i}", "url": "x"}) + "\n" for i in range(5)).encode()
TEXTS = [f"note {i}" for i in range(5)]


def read(path, pattern="**/*", text_field="text"):
    """(texts, {reason: count} left out, messages of bad lines and files)."""
    skipped, bad = Tally(), Tally(num_examples=10)
    files = find_files([str(path)], pattern, (), skipped)
    texts = [r.text for f in files for r in records(f, text_field, skipped, bad)]
    messages = [message for entry in bad.reasons.values() for message in entry["examples"]]
    return texts, {reason: entry["count"] for reason, entry in skipped.reasons.items()}, messages


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "A.JSON", "c4.00-of-12.json.gz", "a.jsonl.zstd",
             "a.ndjson.bz2", "a.jsonl.xz", "a.json.lzma"]
)  # fmt: skip
def test_json_lines_by_any_name(tmp_path, name):
    pack = {"gz": gzip.compress, "zstd": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress,
            "lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE)}.get(name.split(".")[-1], bytes)  # fmt: skip
    (tmp_path / name).write_bytes(pack(LINES))
    assert read(tmp_path / name) == read(tmp_path) == (TEXTS, {}, [])


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [("a.json", b'[{"text": "x"}]', "its first line is not a whole JSON object; write one object per line"),
     ("a.json", b'{\n "text": "x"\n}', "its first line is not a whole JSON object; write one object per line"),
     ("a.csv", b"text\nx\n", ".csv tables are not read; write .jsonl or .parquet"),
     ("a.tsv.gz", gzip.compress(b"text\nx\n", mtime=0), ".tsv tables are not read; write .jsonl or .parquet"),
     ("a.jsonl.lz4", b"x", ".lz4 files are not read; unpack it"), ("a.zip", b"PK", ".zip files are not read"),
     ("notes.txt", LINES,
      "looks like JSON lines, which are read from .jsonl files alone; its fields are 'text', 'url'; rename or exclude it"),
     ("shard", b'{"text": "x"}', "looks like JSON lines"),
     ("part-0000", b'\xef\xbb\xbf{"body": "x"}\n\n{"body": "y"}',
      "looks like JSON lines, which are read from .jsonl files alone; its fields are 'body'; rename or exclude it"),
     ("shard.log.gz", gzip.compress(b'{"n": %s}\n{}\n' % (b"9" * 9000), mtime=0), "its fields are 'n'"),
     ("a.jsonl", b'oops\n[1]\n' + b'{"body": "x"}\n' * 9, "a.jsonl:3: has no field 'text'; its fields are 'body'"),
     ("a.jsonl", b"{%s}" % b", ".join(b'"f%d": 1' % i for i in range(40)), "'f11' and 28 more; name the text's"),
     ("a.jsonl", b'{"body": "x", "title": "y"}\n' * 9,
      "a.jsonl:1: has no field 'text'; its fields are 'body', 'title'; name the text's by --text-field")],
)  # fmt: skip
def test_what_is_refused_in_one_line(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    texts, skipped, messages = read(tmp_path / name)
    assert texts == [] and skipped == {} and rule in messages[-1] and messages[-1].startswith(str(tmp_path / name))
    assert len(messages) == (3 if b"oops" in content else 1)  # its bad lines are named, too


def test_code_that_begins_with_a_brace_is_text(tmp_path):
    contents = {"a.js": '{"use": 1}\nx', "b.txt": "{ text }", "c.py": '{"text"}', "d.ipynb": '{"cells": []}',
                "e.txt": '{"a": 1}\n{"b": '}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert read(tmp_path) == ([*contents.values()], {}, [])


def test_hidden_files_are_counted_and_not_read(tmp_path):
    for name in (".gitattributes", ".cache/huggingface/download/a.jsonl.metadata", "data/.part", "data/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == (["data/a.txt"], {"hidden": 3}, [])
    assert read(tmp_path, ".cache/**")[0] == [".cache/huggingface/download/a.jsonl.metadata"]


def test_a_window_of_two_gibibytes(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    output = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(output, closefd=False) as writer:
        writer.write(LINES)
    assert zstandard.get_frame_parameters(output.getvalue()).window_size == 2**31
    (tmp_path / "a.jsonl.zst").write_bytes(output.getvalue())
    assert read(tmp_path) == (TEXTS, {}, [])


def test_numbers_of_any_length_beside_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": %s}\n{"text": 5}\n{"text": 5.5}\n' % ("9" * 9000))
    texts, _, messages = read(tmp_path)
    assert (
        texts == ["x"]
        and [m.split(": ", 1)[1] for m in messages] == ["the text is of type float, must be a string"] * 2
    )
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "[" * 100_000)
    assert read(tmp_path)[2] == [f"{tmp_path}/a.jsonl:2: is not JSON (nested too deeply); fix or remove the line"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (folder := tmp_path / "in").mkdir()
    mark = b"\xef\xbb\xbf"
    (folder / "a.jsonl").write_bytes(mark + LINES)
    (folder / "b.txt").write_bytes(mark + "note é".encode())
    assert read(folder) == ([*TEXTS, "note é"], {}, [])
    assert read(folder / "b.txt") == (["note é"], {}, [])
    for i in range(30):
        (folder / f"{i}.md").write_bytes(f"same {i}\n".encode())
        (folder / f"{i}.saved.md").write_bytes(mark + f"same {i}\n".encode())
    manifest = prepare(str(folder), str(tmp_path / "out"), "byte", pattern="*.md", validation_fraction=0.3)
    assert manifest["skipped"]["duplicate"]["count"] == 30


def test_long_lines_are_cut_at_spaces_and_large_texts_in_folders_too(tmp_path):
    line = " ".join(f"wörd{i}" for i in range(20_000))
    (tmp_path / "line.txt").write_text(line)
    texts = read(tmp_path / "line.txt")[0]
    assert "".join(texts) == line and len(texts) > 5 and all(t.endswith(" ") for t in texts[:-1])
    assert all(len(t.encode()) <= 3 * PART_BYTES for t in texts)
    (tmp_path / "solid.txt").write_text("é" * 40_000)
    texts = read(tmp_path / "solid.txt")[0]
    assert "".join(texts) == "é" * 40_000 and len(texts) > 1
    (tmp_path / "line.txt").write_text("a line\n" * (WHOLE_BYTES // 7 + 1))
    (tmp_path / "solid.txt").unlink()
    assert len(read(tmp_path)[0]) > 50
    (tmp_path / "line.txt").write_text("a line\n" * (WHOLE_BYTES // 7))
    assert len(read(tmp_path)[0]) == 1


def test_columns_of_text(tmp_path):
    texts = [f"note é {i}" for i in range(300)]
    raw = [text.encode() for text in texts]
    types = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    columns = [pa.array(texts, pa.string()).cast(kind) for kind in types]
    columns += [pa.array(raw, pa.binary()), pa.array(raw, pa.large_binary())]
    for column in columns:
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert read(tmp_path) == (texts, {}, []), column.type
    nested = pa.StructArray.from_arrays([pa.array(texts), pa.array(texts)], ["text", "title"])
    pq.write_table(pa.table({"doc": nested}), tmp_path / "a.parquet")
    assert read(tmp_path, text_field="doc.text") == (texts, {}, [])


def test_bad_rows_and_columns(tmp_path):
    raw = [b"note %d" % i for i in range(60)]
    raw[30] = b"caf\xe9"
    buffers = pa.array(raw, pa.binary()).buffers()
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 60, [None, *buffers[1:]])}), tmp_path / "a.parquet"
    )
    texts, skipped, messages = read(tmp_path)
    assert len(texts) == 59 and skipped == {"not UTF-8": 1} and messages == []
    pq.write_table(pa.table({"text": pa.array(["x", None, ""])}), tmp_path / "a.parquet")
    assert read(tmp_path) == (["x", ""], {"null text": 1}, [])
    pq.write_table(pa.table({"text": pa.array([["x"], ["y"]]), "n": [1, 2]}), tmp_path / "a.parquet")
    for field, rule in (
        ("text", "column 'text' is of type list<element: string>, must be string or binary"),
        ("n", "column 'n' is of type int64, must be string or binary"),
        ("text.x", "has no column 'text.x'; its columns are text, n; name the text's by --text-field"),
    ):
        assert read(tmp_path, text_field=field) == ([], {}, [f"{tmp_path}/a.parquet: {rule}"])


def test_bad_lines_may_be_left_out_up_to_a_number(tmp_path):
    (folder := tmp_path / "in").mkdir()
    (folder / "a.jsonl").write_bytes(LINES * 4 + b"nothing\n" * 3)
    options = {"pattern": "*.jsonl", "validation_fraction": 0.3}
    for allowed, said in (
        (0, "3 bad lines; or leave them out by --skip-bad-lines N"),
        (2, "3 bad lines; 2 are allowed"),
    ):
        with pytest.raises(UserError) as error:
            prepare(str(folder), str(tmp_path / "out"), "byte", skip_bad_lines=allowed, **options)
        assert len(error.value.problems) == 4 and error.value.problems[-1].startswith(said)
    manifest = prepare(str(folder), str(tmp_path / "out"), "byte", skip_bad_lines=3, **options)
    assert manifest["skipped"]["bad line"]["count"] == 3
    streams = [stream for split in TokenStore(str(tmp_path / "out")).streams.values() for stream in split.values()]
    assert sum(stream.num_documents for stream in streams) == 5


def test_options_that_would_change_nothing_or_point_elsewhere(tmp_path):
    (folder := tmp_path / "in").mkdir()
    (folder / "a.md").write_text("x")
    with pytest.raises(UserError, match="text_field = 'note': none of the 1 files is JSON lines or Parquet"):
        prepare(str(folder), str(tmp_path / "out"), "byte", text_field="note", pattern="*.md")
    for out, rule in (("a,b", "must not have a comma"), ("~/out", "~ is not expanded here; nearest: '/")):
        with pytest.raises(UserError, match=rule):
            prepare(str(folder), out, "byte")
    (folder / "in/deep").mkdir(parents=True)
    (folder / "in/deep/a.md").write_text("x")
    with pytest.raises(UserError, match=r"files at the top of a folder alone; '\*\*/\*.md' finds them below it"):
        prepare(str(folder / "in"), str(tmp_path / "out"), "byte", pattern="*.md")
