"""Where documents come from: named sources, their files, and the documents of a file, in an order that never changes.

Nothing is passed over in silence: what is left out is counted by reason in a Tally, and what cannot be read as its
kind of file says is collected as bad, for one error that names it all.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.files import is_url

PART_BYTES = 2**14
_SOURCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION_CONTROL = (".git", ".hg", ".svn")
EXTRA = "pip install 'k2jax[data]'"


class Tally:
    """Names counted by reason, with the first few of each."""

    def __init__(self, num_examples: int = 5):
        self.reasons, self.num_examples = {}, num_examples

    def add(self, reason: str, *names: str, count: int = 1) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] += names[: self.num_examples - len(entry["examples"])]

    def merge(self, reasons: dict) -> None:
        """Count what another tally found after this one."""
        for reason, entry in reasons.items():
            self.add(reason, *entry["examples"], count=entry["count"])


class File(NamedTuple):
    source: str  # the name of its source
    name: str  # its path inside the source
    path: str  # where it is: a local path or a URL
    size: int  # bytes
    stamp: str  # changes with the content: time of change in ns, or the object's tag
    alone: bool  # named by itself, not found in a folder


class Record(NamedTuple):
    name: str
    text: str
    origin: dict | None  # {"source", "name", "sha256"} of the text that this one rephrases


def source_and_path(spec: str) -> tuple[str, str]:
    """("wiki", "dump/") of "wiki=dump/"; a path alone is of the source "text"."""
    match = _SOURCE.fullmatch(spec)
    return (match[1], match[2]) if match else ("text", spec)


def _glob(pattern: str) -> str:
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\{[^{}]*\}|[^*?{]+|\{", pattern)
    choices = {p: "(?:" + "|".join(map(_glob, p[1:-1].split(","))) + ")" for p in parts if len(p) > 1 and p[0] == "{"}
    return "".join(meaning.get(part) or choices.get(part) or re.escape(part) for part in parts)


def _glob_regex(pattern: str) -> re.Pattern:
    """`**/` is any folders, `*` and `?` stay within a name, `{a,b}` is either."""
    return re.compile(_glob(pattern), re.DOTALL)


def _names_in(folder: str, skipped: Tally) -> list[str]:
    """Paths of all files inside a local folder."""
    found = []
    for root, folders, files in os.walk(folder, onerror=lambda error: skipped.add("unreadable folder", error.filename)):
        for name in sorted(folders):
            if os.path.islink(os.path.join(root, name)):
                skipped.add("link to a folder", os.path.join(root, name))
            elif name in _VERSION_CONTROL:
                skipped.add("version control", os.path.join(root, name))
        folders[:] = [name for name in folders if name not in _VERSION_CONTROL]
        inside = os.path.relpath(root, folder)
        found += (os.path.normpath(os.path.join(inside, name)) for name in files)
    return found


def _local_files(source: str, path: str, chosen, skipped: Tally) -> Iterator[File]:
    alone = not os.path.isdir(path)
    for name in [os.path.basename(path)] if alone else chosen(_names_in(path, skipped)):
        place = path if alone else os.path.join(path, name)
        if not os.path.isfile(place):
            skipped.add("not a file", name)
            continue
        status = os.stat(place)
        yield File(source, name, place, status.st_size, str(status.st_mtime_ns), alone)


def _remote_files(source: str, url: str, chosen) -> Iterator[File]:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(url)
    found = {path: info for path, info in system.find(root, detail=True).items() if info["type"] == "file"}
    alone = [*found] == [root]
    inside = {path[path.rindex("/") + 1 :] if alone else path[len(root) :].lstrip("/"): path for path in found}
    for name in inside if alone else chosen([*inside]):
        info = found[inside[name]]
        stamp = next((str(info[key]) for key in ("ETag", "LastModified", "mtime", "created") if info.get(key)), "")
        yield File(source, name, system.unstrip_protocol(inside[name]), info["size"], stamp, alone)


def find_files(specs: list[str], pattern: str, exclude: tuple[str, ...], skipped: Tally) -> list[File]:
    """Every file that matches, by source in the given order, within a folder sorted by its path in there."""
    wanted, unwanted = _glob_regex(pattern), [_glob_regex(e) for e in exclude]

    def chosen(names: list[str]) -> Iterator[str]:
        for name in sorted(names):
            if wanted.fullmatch(name):
                if any(e.fullmatch(name) for e in unwanted):
                    skipped.add("excluded", name)
                else:
                    yield name

    files = []
    for spec in specs:
        source, path = source_and_path(spec)
        files += _remote_files(source, path, chosen) if is_url(path) else _local_files(source, path, chosen, skipped)
    return files


def missing_for(files: list[File]) -> Iterator[str]:
    """What is not installed and these files need."""
    kinds = {".parquet": "pyarrow", ".zst": "zstandard"}
    for suffix, module in kinds.items():
        names = [file.path for file in files if file.path.lower().endswith(suffix)]
        if names and importlib.util.find_spec(module) is None:
            yield f"source: {len(names)} files like {names[0]!r} need {module}; {EXTRA}"


class _Zstd(io.RawIOBase):
    """The content of all frames; EOFError where the last one is cut off, which zstandard's own reader passes over."""

    def __init__(self, packed: io.BufferedIOBase):
        import zstandard

        self.packed, self.new_frame = packed, zstandard.ZstdDecompressor().decompressobj
        self.frame, self.rest, self.ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def _fill(self) -> None:
        """Decompress until something is ready, or nothing is left."""
        while not self.ready and (packed := self.rest or self.packed.read(2**20)):
            self.frame = self.frame or self.new_frame()
            self.ready, self.rest = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None

    def readinto(self, buffer) -> int:
        self._fill()
        if not self.ready and self.frame is not None:
            raise EOFError("the compressed file ends within a frame")
        part = self.ready[: len(buffer)]
        buffer[: len(part)] = part
        self.ready = self.ready[len(part) :]
        return len(part)


@contextlib.contextmanager
def _open(path: str) -> Iterator[io.BufferedIOBase]:
    """The decompressed bytes of a file, to read forward."""
    with contextlib.ExitStack() as stack:
        if is_url(path):
            import fsspec

            stream = stack.enter_context(fsspec.open(path, "rb"))
        else:
            stream = stack.enter_context(open(path, "rb"))
        if path.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        elif path.lower().endswith(".zst"):
            stream = stack.enter_context(io.BufferedReader(_Zstd(stream), 2**20))
        yield stream


def _is_origin(value: object) -> bool:
    keys = ("source", "name", "sha256")
    fits = isinstance(value, dict) and all(isinstance(value.get(key), str) and value[key] for key in keys)
    return fits and bool(_SHA256.fullmatch(value["sha256"]))


def _record(place: str, path: str, value: object, text_field: str, bad: Tally) -> Record | None:
    """The record of one line or row; None, and an entry in `bad`, where it has no text."""
    text, origin = (value.get(text_field), value.get("origin")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str):
        bad.add("line", f"{path}: must be a JSON object whose field {text_field!r} is text")
    elif origin is not None and not _is_origin(origin):
        bad.add("line", f"{path}: 'origin' must have 'source', 'name' and 'sha256' of the text that this one rephrases")
    else:
        return Record(place, text, origin)
    return None


def _lines(file: File, text_field: str, skipped: Tally, bad: Tally) -> Iterator[Record]:
    with _open(file.path) as stream:
        for number, line in enumerate(stream, 1):
            place, path = f"{file.name}:{number}", f"{file.path}:{number}"
            if not line.strip():
                skipped.add("empty line", place)
                continue
            try:
                if record := _record(place, path, json.loads(line.decode("utf-8")), text_field, bad):
                    yield record
            except UnicodeDecodeError:
                bad.add("line", f"{path}: is not UTF-8; mend or remove the line")
            except (ValueError, RecursionError) as error:
                bad.add("line", f"{path}: is not JSON ({error}); mend or remove the line")


def _rows(file: File, text_field: str, bad: Tally) -> Iterator[Record]:
    import pyarrow.parquet

    with _open(file.path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
        names, number = table.schema_arrow.names, 0
        if text_field not in names:
            bad.add("line", f"{file.path}: has no column {text_field!r}; its columns are {', '.join(names)}")
            return
        columns = [name for name in (text_field, "origin") if name in names]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if record := _record(f"{file.name}:{number}", f"{file.path}:{number}", row, text_field, bad):
                    yield record


def _parts(file: File, skipped: Tally) -> Iterator[Record]:
    """A text named by itself, cut at line ends into parts of at least PART_BYTES: held-out text needs more than one."""
    start = 0
    with _open(file.path) as stream:
        while part := stream.read(PART_BYTES):
            part += stream.readline()
            try:
                yield Record(f"{file.name}@{start}", part.decode("utf-8"), None)
            except UnicodeDecodeError:
                skipped.add("not UTF-8", f"{file.name}@{start}")
            start += len(part)


def _whole(file: File, skipped: Tally) -> Iterator[Record]:
    with _open(file.path) as stream:
        try:
            yield Record(file.name, stream.read().decode("utf-8"), None)
        except UnicodeDecodeError:
            skipped.add("not UTF-8", file.name)


def records(file: File, text_field: str, skipped: Tally, bad: Tally) -> Iterator[Record]:
    """Every record of a file, empty ones too; the suffix says how it is read."""
    suffixes = [suffix.lower() for suffix in Path(file.name).suffixes]
    kind = suffixes[-2] if suffixes[-1:] in ([".gz"], [".zst"]) and len(suffixes) > 1 else "".join(suffixes[-1:])
    try:
        if kind == ".jsonl":
            yield from _lines(file, text_field, skipped, bad)
        elif kind == ".parquet":
            yield from _rows(file, text_field, bad)
        elif file.alone:
            yield from _parts(file, skipped)
        else:
            yield from _whole(file, skipped)
    except PermissionError:
        skipped.add("unreadable", file.name)
    except Exception as error:  # of gzip, zstandard, pyarrow, fsspec: each has its own
        bad.add("line", f"{file.path}: cannot be read to its end: {type(error).__name__}: {error}; mend or exclude it")
