"""Documents to a token store: read, drop duplicates, split by content, tokenise, write.

A document belongs to validation by a hash of its content, so the same text is always on the same side, whatever
the order or the other documents. What is left out is counted by reason, in the summary and in the manifest.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.config import UserError
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_vocab
from k2jax.data.tokens import CHUNK_TOKENS, SHARD_TOKENS, SPLITS, TokenWriter
from k2jax.files import sync_folder

PART_BYTES = 2**14


class Document(NamedTuple):
    name: str
    text: str
    place: float  # in [0, 1), by content; validation has the lowest


class _File(NamedTuple):
    name: str
    path: Path
    alone: bool  # a source by itself, not found in a folder


class _Tally:
    """Names counted by reason, with the first few of each."""

    def __init__(self, num_examples: int = 5):
        self.reasons, self.num_examples = {}, num_examples

    def add(self, reason: str, name: str) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < self.num_examples:
            entry["examples"].append(name)


def _glob_regex(pattern: str) -> re.Pattern:
    """`**/` is any folders, `*` and `?` stay within a name."""
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern)
    return re.compile("".join(meaning.get(part) or re.escape(part) for part in parts), re.DOTALL)


def _files_in(folder: Path, pattern: str, exclude: tuple[str, ...], skipped: _Tally) -> Iterator[_File]:
    """Every file that matches, named by its path inside the folder, sorted."""
    wanted, unwanted = _glob_regex(pattern), [_glob_regex(e) for e in exclude]
    found = []
    for root, folders, files in os.walk(folder, onerror=lambda error: skipped.add("unreadable folder", error.filename)):
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                skipped.add("link to a folder", os.path.join(root, name))
        inside = os.path.relpath(root, folder)
        found += (os.path.normpath(os.path.join(inside, name)) for name in files)
    for name in sorted(found):
        if wanted.fullmatch(name):
            if any(e.fullmatch(name) for e in unwanted):
                skipped.add("excluded", name)
            else:
                yield _File(name, folder / name, alone=False)


def _texts_of_lines(name: str, path: Path, text_field: str, skipped: _Tally, bad: _Tally):
    """(name, text) of every line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                skipped.add("empty line", f"{name}:{number}")
                continue
            try:
                value = json.loads(line.decode("utf-8"))
                text = value.get(text_field) if isinstance(value, dict) else None
                if isinstance(text, str):
                    yield f"{name}:{number}", text
                else:
                    bad.add("line", f"{path}:{number}: must be a JSON object whose field {text_field!r} is text")
            except UnicodeDecodeError:
                bad.add("line", f"{path}:{number}: is not UTF-8; mend or remove the line")
            except (ValueError, RecursionError) as error:
                bad.add("line", f"{path}:{number}: is not JSON ({error}); mend or remove the line")


def _parts(name: str, path: Path, skipped: _Tally) -> Iterator[tuple[str, str]]:
    """A text named by itself, cut at line ends into parts of at least PART_BYTES: held-out text needs more than one."""
    start, end = 0, path.stat().st_size
    with open(path, "rb") as file:
        while start < end:
            part = file.read(PART_BYTES) + file.readline()
            try:
                yield f"{name}@{start}", part.decode("utf-8")
            except UnicodeDecodeError:
                skipped.add("not UTF-8", f"{name}@{start}")
            start += len(part)


def _texts(files: list[_File], text_field: str, skipped: _Tally, bad: _Tally) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, duplicates and empty ones too."""
    for name, path, alone in files:
        if not path.is_file():
            skipped.add("not a file", name)
            continue
        try:
            if path.suffix.lower() == ".jsonl":
                yield from _texts_of_lines(name, path, text_field, skipped, bad)
            elif alone:
                yield from _parts(name, path, skipped)
            else:
                yield name, path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped.add("not UTF-8", name)
        except OSError:
            skipped.add("unreadable", name)


def _documents(files: list[_File], text_field: str, skipped: _Tally) -> Iterator[Document]:
    """Every document once. UserError at the end if a .jsonl line is bad. Memory: 32 bytes and more per document."""
    seen, bad = set(), _Tally(num_examples=10)
    for name, text in _texts(files, text_field, skipped, bad):
        try:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            skipped.add("not UTF-8", name)
            continue
        if not text:
            skipped.add("empty", name)
        elif digest in seen:
            skipped.add("duplicate", name)
        elif not bad.reasons:  # otherwise all will be refused, so only look for further bad lines
            seen.add(digest)
            yield Document(name, text, int.from_bytes(digest[:8], "big") / 2**64)
    for entry in bad.reasons.values():
        rest = [f"{entry['count']} bad lines in all; the first 10 are above"] if entry["count"] > 10 else []
        raise UserError(*entry["examples"], *rest)


def _argument_problems(sources: list[Path], out: Path, fraction: float):
    if not sources:
        yield "source: is an empty list; name a folder or a file"
    for source in sources:
        if not source.exists():
            yield f"source = {str(source)!r}: no such file or folder"
        elif source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            yield f"out = {str(out)!r}: must not lie inside source = {str(source)!r}; name a folder outside"
    if os.path.lexists(out):
        yield f"out = {str(out)!r}: exists already; name a new folder, or remove this one"
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        yield f"validation_fraction = {fraction!r}: must be above 0 and below 1; 0.02 is usual"


def _tokenizer_or_problems(spec: str) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """None without problems stands for one yet to be trained."""
    try:
        return (load_tokenizer(spec) if train_vocab(spec) is None else None), ()
    except UserError as error:
        return None, error.problems


def _refuse_lopsided(manifest: dict, places: tuple[float, float], source, fraction: float) -> None:
    """UserError unless both splits have a document; `places` are the lowest and the highest."""
    counts = [manifest["splits"][split]["documents"] for split in SPLITS]
    if all(counts):
        return
    reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in manifest["skipped"].items())
    left_out = f" (left out: {reasons})" if reasons else ""
    if not any(counts):
        rule = f"no document matches pattern = {manifest['pattern']!r}{left_out}"
        raise UserError(f"source = {source!r}: {rule}; change one of them")
    if sum(counts) == 1:
        raise UserError(
            f"source = {source!r}: holds one document{left_out}, but training and validation need one each; "
            "split it into files, or into the lines of a .jsonl"
        )
    fits = f"above {places[0]:.6g} and at most {places[1]:.6g}"
    empty = SPLITS[counts.index(0)]
    found = f"validation_fraction = {fraction}: leaves none of {sum(counts)} documents for {empty}"
    raise UserError(f"{found}; for these documents it must be {fits}")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` at the end, or vanishes with an error.

    A kill leaves it behind, and the next prepare into the same `out` empties it. The lock tells the two apart.
    """
    partial = out.with_name(f".{out.name}.k2jax-partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"out = {str(out)!r}: cannot be made: {error.strerror}; name another folder") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(partial))
        except OSError:
            mine = False
        if not mine or out.exists():
            raise UserError(f"out = {str(out)!r}: another prepare is writing it; wait for it, or name another folder")
        try:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield partial
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial)
            raise
        sync_folder(out.parent)
    finally:
        os.close(descriptor)


def _write(writer: TokenWriter, documents: Iterator[Document], fraction: float, progress) -> tuple[float, float]:
    """Write all documents; their lowest and highest places."""
    lowest, highest, num_documents, text_bytes = 1.0, 0.0, 0, 0
    for document in documents:
        text_bytes += writer.append(SPLITS[document.place < fraction], document.name, document.text)
        lowest, highest, num_documents = min(lowest, document.place), max(highest, document.place), num_documents + 1
        if progress:
            progress(num_documents, text_bytes)
    return lowest, highest


def _find_files(sources: list[Path], pattern: str, exclude: tuple[str, ...], skipped: _Tally) -> list[_File]:
    files = []
    for path in sources:
        files += _files_in(path, pattern, exclude, skipped) if path.is_dir() else [_File(path.name, path, alone=True)]
    return files


def prepare(
    source: str | list[str],
    out: str,
    tokenizer: str,
    *,
    pattern: str = "**/*",
    exclude: tuple[str, ...] = (),
    validation_fraction: float = 0.02,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict:
    """Make the token store `out` and return its manifest without the files, with "path" and "digest".

    source: folders and files. A .jsonl file has a document on each line, in the field `text_field`; every other file
    in a folder is one document, and a text named by itself is cut at line ends into documents of 16 KiB or more.
    `pattern` and `exclude` (`**/`, `*`, `?`) choose files in folders, by their path in there.
    tokenizer: "byte", a .tiktoken file, a tokenizer.json, or "train:VOCAB", trained on the training split.
    progress: called with the documents and text bytes so far. UserError, and nothing written, for arguments and lines
    that cannot be, and where training or validation would have no document.
    """
    sources = [Path(s) for s in ([source] if isinstance(source, (str, Path)) else source)]
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    chosen, problems = _tokenizer_or_problems(tokenizer)
    problems = [*_argument_problems(sources, Path(out), validation_fraction), *problems]
    if problems:
        raise UserError(*problems)
    skipped = _Tally()
    files = _find_files(sources, pattern, exclude, skipped)
    if chosen is None:  # the first of two readings; what it skips, the second counts
        documents = _documents(files, text_field, _Tally())
        texts = (document.text for document in documents if document.place >= validation_fraction)
        chosen = train_bpe(texts, train_vocab(tokenizer))
    sizes = {"shard_tokens": shard_tokens, "chunk_tokens": chunk_tokens}
    with _new_folder(Path(out)) as folder, TokenWriter(folder, chosen, **sizes) as writer:
        places = _write(writer, _documents(files, text_field, skipped), validation_fraction, progress)
        manifest = writer.finish(
            source=[str(path) for path in sources],
            pattern=pattern,
            exclude=list(exclude),
            validation_fraction=validation_fraction,
            text_field=text_field,
            skipped=skipped.reasons,
        )
        _refuse_lopsided(manifest, places, source, validation_fraction)
        digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return {"path": str(out), "digest": digest, **{key: manifest[key] for key in manifest if key != "files"}}
