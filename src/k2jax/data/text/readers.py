"""The documents of a file. Its suffix says how it is read; what a suffix does not say is refused, never guessed.

    .jsonl .ndjson .jsonlines    a document in each line, in the field `text_field`
    .json                        the same if its first line is a whole JSON object; anything else is refused
    .parquet                     a document in each row, in the column `text_field` ("doc.text" for a nested one)
    .csv .tsv, archives          refused
    all others                   text: one document, or parts of it if it is large or named by itself; refused if it
                                 begins with two JSON objects, a line each, or with one that has `text_field`

What is left out is counted by reason in the Tally `skipped`. What cannot be read is collected in the Tally `bad`, for
one error that names it all: lines under "line", of which a user may allow some, whole files under "file".
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from k2jax.data.text.packed import ARCHIVES, open_unpacked, suffixes_of
from k2jax.data.text.sources import File, Tally, find_files, missing_for
from k2jax.errors import UserError

PART_BYTES = 2**14
WHOLE_BYTES = 2**20  # a larger text in a folder is cut into parts as well, or nearly nothing of it could be held out
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
TABLES = (".csv", ".tsv")
_BOM = b"\xef\xbb\xbf"
_MAX_FIELDS_SHOWN = 12
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Record(NamedTuple):
    name: str
    text: str
    origin: dict | None  # {"source", "name", "sha256"} of the text that this one rephrases


def choose_files(
    specs: list[str], pattern: str, exclude: tuple[str, ...], text_field: str, skipped: Tally
) -> list[File]:
    """The files of all sources. UserError if a URL cannot be listed, a kind of file not be read here, or no file has
    fields that `text_field` could name.
    """
    try:
        files = find_files(specs, pattern, exclude, skipped)
    except (OSError, ImportError, ValueError) as error:  # a URL's: what fsspec raises for a bucket, or says to install
        raise UserError(f"source: cannot be listed: {type(error).__name__}: {error}") from None
    problems = [*missing_for(files)]
    have_fields = any(suffixes_of(file.name)[0] in (*JSON_LINES, ".parquet") for file in files)
    if text_field != "text" and files and not have_fields:
        rule = f"none of the {len(files)} files is JSON lines or Parquet, so that it names nothing; leave it out"
        problems.append(f"text_field = {text_field!r}: {rule}")
    if problems:
        raise UserError(*problems)
    return files


def parse_json(text: str | bytes) -> object:
    """The JSON value. Integers come as floats: nothing here reads them, and an int has a limit of 4,300 digits.

    Raises ValueError, also for text that is not UTF-8 and for what is nested too deeply.
    """
    try:
        return json.loads(text, parse_int=float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _fields_of(value: dict) -> str:
    """The first few names of an object's fields, for a message."""
    rest = f" and {len(value) - _MAX_FIELDS_SHOWN} more" if len(value) > _MAX_FIELDS_SHOWN else ""
    return ", ".join(map(repr, [*value][:_MAX_FIELDS_SHOWN])) + rest if value else "none"


def _is_origin(value: object) -> bool:
    keys = ("source", "name", "sha256")
    fits = isinstance(value, dict) and all(isinstance(value.get(key), str) and value[key] for key in keys)
    return fits and bool(_SHA256.fullmatch(value["sha256"]))


def _record(name: str, path: str, text: object, origin: object, skipped: Tally, bad: Tally) -> Record | None:
    """The record of one line or row; None if it has no text, which is counted."""
    if text is None:
        skipped.add("null text", name)
    elif not isinstance(text, str):
        bad.add("line", f"{path}: the text is of type {type(text).__name__}, must be a string")
    elif origin is not None and not _is_origin(origin):
        bad.add("line", f"{path}: 'origin' must have 'source', 'name' and 'sha256' of the text that this one rephrases")
    else:
        return Record(name, text, origin)
    return None


def _lines(file: File, text_field: str, skipped: Tally, bad: Tally) -> Iterator[Record]:
    is_named_so, is_first = suffixes_of(file.name)[0] != ".json", True
    with open_unpacked(file.path) as stream:
        for number, line in enumerate(stream, 1):
            name, path = f"{file.name}:{number}", f"{file.path}:{number}"
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                skipped.add("empty line", name)
                continue
            try:
                value, problem = parse_json(line.decode("utf-8")), None
            except UnicodeDecodeError:
                value, problem = None, "is not UTF-8"
            except ValueError as error:
                value, problem = None, f"is not JSON ({error})"
            if is_first and not is_named_so and not isinstance(value, dict):
                rule = "is read as JSON lines, but its first line is not a whole JSON object"
                bad.add("file", f"{file.path}: {rule}; write one object per line, or exclude it")
                return
            if is_first and isinstance(value, dict) and text_field not in value:
                rule = f"has no field {text_field!r}; its fields are {_fields_of(value)}"
                bad.add("file", f"{path}: {rule}; name the text's by --text-field")
                return
            is_first = is_first and not isinstance(value, dict)  # the first object, after bad lines as well
            if problem is None and not isinstance(value, dict):
                problem = "is not a JSON object"
            elif problem is None and text_field not in value:
                problem = f"has no field {text_field!r}"
            if problem is not None:
                bad.add("line", f"{path}: {problem}; fix or remove the line")
            elif record := _record(name, path, value[text_field], value.get("origin"), skipped, bad):
                yield record


def _column(schema, text_field: str):
    """The type of a column, or of a field inside a struct column for a dotted name; None if there is none."""
    import pyarrow

    if text_field in schema.names:
        return schema.field(text_field).type
    kind = None
    for depth, name in enumerate(text_field.split(".")):
        fields = schema if depth == 0 else kind if pyarrow.types.is_struct(kind) else None
        if fields is None or (fields.names if depth == 0 else [f.name for f in fields]).count(name) != 1:
            return None
        kind = fields.field(name).type
    return kind


def _as_bytes(array):
    """A column of text, which may hold what is not UTF-8, as bytes; dictionaries are decoded."""
    import pyarrow

    array = array.dictionary_decode() if pyarrow.types.is_dictionary(array.type) else array
    views = {pyarrow.string_view(): pyarrow.binary_view(), pyarrow.string(): pyarrow.binary()}
    return array.view(views.get(array.type, array.type)) if array.type in views else array.cast(pyarrow.large_binary())


def _rows(file: File, text_field: str, skipped: Tally, bad: Tally) -> Iterator[Record]:
    import pyarrow.parquet
    from pyarrow import types

    with open_unpacked(file.path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
        schema, number = table.schema_arrow, 0
        kind = _column(schema, text_field)
        if kind is None:
            rule = f"has no column {text_field!r}; its columns are {', '.join(schema.names)}"
            bad.add("file", f"{file.path}: {rule}; name the text's by --text-field")
            return
        inner = kind.value_type if types.is_dictionary(kind) else kind
        tests = types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary
        if not any(is_text(inner) for is_text in (*tests, types.is_binary_view)):
            bad.add("file", f"{file.path}: column {text_field!r} is of type {kind}, must be string or binary")
            return
        path = [text_field] if text_field in schema.names else text_field.split(".")
        columns = [text_field, *(["origin"] if "origin" in schema.names else [])]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            column = batch.column(path[0])
            for name in path[1:]:
                column = pyarrow.compute.struct_field(column, name)
            origins = batch.column("origin").to_pylist() if len(columns) > 1 else [None] * len(batch)
            for value, origin in zip(_as_bytes(column).to_pylist(), origins, strict=True):
                number += 1
                name = f"{file.name}:{number}"
                try:
                    text = None if value is None else value.decode("utf-8")
                except UnicodeDecodeError:
                    skipped.add("not UTF-8", name)
                    continue
                if record := _record(name, f"{file.path}:{number}", text, origin, skipped, bad):
                    yield record


def _cut(part: bytes) -> int:
    """Bytes of `part`, which no line end closes, to keep: up to its last space, else to its last whole character."""
    if end := max(part.rfind(mark) for mark in (b" ", b"\t", b"\r")) + 1:
        return end
    start = next((i for i in range(1, 5) if part[-i] & 0xC0 != 0x80), 1)  # of the last character
    return len(part) - start or len(part)


def _parts(file: File, skipped: Tally) -> Iterator[Record]:
    """A text cut into parts of at least PART_BYTES: at line ends, or at spaces if a line is longer than a part."""
    start, rest = 0, b""
    with open_unpacked(file.path) as stream:
        while part := rest + stream.read(PART_BYTES):
            line = stream.readline(PART_BYTES)
            part, rest = part + line, b""
            if len(line) == PART_BYTES and not line.endswith(b"\n"):
                part, rest = part[: (end := _cut(part))], part[end:]
            try:
                yield Record(f"{file.name}@{start}", part.decode("utf-8-sig" if start == 0 else "utf-8"), None)
            except UnicodeDecodeError:
                skipped.add("not UTF-8", f"{file.name}@{start}")
            start += len(part)


def _whole(file: File, skipped: Tally) -> Iterator[Record]:
    with open_unpacked(file.path) as stream:
        try:
            yield Record(file.name, stream.read().decode("utf-8-sig"), None)
        except UnicodeDecodeError:
            skipped.add("not UTF-8", file.name)


def _fields_as_json_lines(file: File, text_field: str) -> str | None:
    """The fields of a text's first line, if it and the next are JSON objects, or if it has the text's field.

    One object without that field may be a text: a notebook, a map. Two lines of them are records of some kind.
    """
    first = None
    with open_unpacked(file.path) as stream:
        lines = (line for line in iter(lambda: stream.readline(2**24), b"") if line.strip())
        for line in itertools.islice(lines, 2):
            line = line.removeprefix(_BOM).strip()
            if not line.startswith(b"{") or not line.endswith(b"}"):
                return None
            try:
                value = parse_json(line)
            except ValueError:
                return None
            if first is not None or text_field in value:
                return _fields_of(first or value)
            first = value
    return None


def records(file: File, text_field: str, skipped: Tally, bad: Tally) -> Iterator[Record]:
    """Every record of a file, empty ones too, in its order."""
    kind, packed = suffixes_of(file.name)
    try:
        if kind in ARCHIVES:
            bad.add("file", f"{file.path}: {kind} files are not read; unpack it, or exclude it")
        elif kind in TABLES:
            bad.add("file", f"{file.path}: {kind} tables are not read; write .jsonl or .parquet, or exclude it")
        elif kind in JSON_LINES:
            yield from _lines(file, text_field, skipped, bad)
        elif kind == ".parquet":
            yield from _rows(file, text_field, skipped, bad)
        elif fields := _fields_as_json_lines(file, text_field):
            rule = f"looks like JSON lines, which are read from .jsonl files alone; its fields are {fields}"
            bad.add("file", f"{file.path}: {rule}; rename or exclude it")
        elif file.alone or file.size > WHOLE_BYTES:
            yield from _parts(file, skipped)
        else:
            yield from _whole(file, skipped)
    except PermissionError:
        skipped.add("unreadable", file.name)
    except Exception as error:  # of gzip, zstandard, pyarrow, fsspec: each has its own
        bad.add("file", f"{file.path}: cannot be read to its end: {type(error).__name__}: {error}; fix or exclude it")
