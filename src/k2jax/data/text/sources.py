"""Named sources and their files, in an order that never changes. What is left out is counted by reason in a Tally."""

import importlib.util
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from k2jax.errors import UserError
from k2jax.files import is_url

_SOURCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)
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


def refuse_bad(bad: Tally, allowed: int) -> None:
    """UserError for lines and files that could not be read, unless they are at most `allowed` lines and no file.

    It has the first few of each, with a count of the rest.
    """
    lines = bad.reasons.get("line", {"count": 0})["count"]
    if bad.reasons.keys() <= {"line"} and lines <= allowed:
        return
    messages = []
    for reason, entry in sorted(bad.reasons.items()):
        messages += entry["examples"]
        if (rest := entry["count"] - len(entry["examples"])) > 0:
            messages.append(f"and {rest} more bad {reason}{'s' if rest > 1 else ''}, {entry['count']} in all")
    if lines > allowed:
        rule = f"{allowed} are allowed" if allowed else "or leave them out"
        messages.append(f"{lines} bad line{'s' if lines > 1 else ''}; {rule} by --skip-bad-lines N")
    raise UserError(*messages)


class File(NamedTuple):
    source: str  # the name of its source
    name: str  # its path inside the source
    path: str  # where it is: a local path or a URL
    size: int  # bytes
    stamp: str  # changes with the content: time of change in ns, or the object's tag
    alone: bool  # named by itself, not found in a folder


def source_and_path(spec: str) -> tuple[str, str]:
    """("wiki", "dump/") of "wiki=dump/"; a path alone is of the source "text"."""
    match = _SOURCE.fullmatch(spec)
    return (match[1], match[2]) if match else ("text", spec)


def path_problems(specs: list[str]) -> Iterator[str]:
    """Problems with the paths of sources, of which no file is read."""
    if not specs:
        yield "source: is an empty list; name a folder or a file"
    for spec in specs:
        _, path = source_and_path(spec)
        if is_url(path):
            if importlib.util.find_spec("fsspec") is None:
                yield f"source = {path!r}: a URL needs fsspec; {EXTRA}"
        elif not os.path.exists(path):
            expanded = os.path.expanduser(path)
            hint = f"; ~ is not expanded here, give {expanded!r}" if path != expanded else ""
            yield f"source = {path!r}: no such file or folder{hint}"


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
    """Every file that matches, by source in the given order, within a folder sorted by its path in there.

    Hidden files and folders (.gitattributes, the .cache of a hub's download) are left out unless the pattern names a
    hidden one itself (`.config/*`).
    """
    wanted, unwanted = _glob_regex(pattern), [_glob_regex(e) for e in exclude]
    takes_hidden = any(part.startswith(".") for part in pattern.split("/"))

    def chosen(names: list[str]) -> Iterator[str]:
        for name in sorted(names):
            if wanted.fullmatch(name):
                if any(e.fullmatch(name) for e in unwanted):
                    skipped.add("excluded", name)
                elif not takes_hidden and any(part.startswith(".") for part in name.split("/")):
                    skipped.add("hidden", name)
                else:
                    yield name

    files = []
    for spec in specs:
        source, path = source_and_path(spec)
        files += _remote_files(source, path, chosen) if is_url(path) else _local_files(source, path, chosen, skipped)
    return files


def missing_for(files: list[File]) -> Iterator[str]:
    """Packages that these files need and that are not installed."""
    kinds = {"pyarrow": (".parquet",), "zstandard": (".zst", ".zstd")}
    for module, suffixes in kinds.items():
        names = [file.path for file in files if file.path.lower().endswith(suffixes)]
        if names and importlib.util.find_spec(module) is None:
            yield f"source: {len(names)} files like {names[0]!r} need {module}; {EXTRA}"
