"""The tasks of a preparation. Documents are read twice, so that no second copy of all the text is ever kept.

read       filters each document, and keeps its number, digest and signature
match      pairs of equal and of similar documents, each rank a share of all keys
resolve    one rank: which documents stay
tokenizer  one rank: a copy of the tokenizer, or one trained on the training split
write      reads again and writes the documents that stay, as part of the store
merge      one rank: the parts become the store
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from k2jax.data.store.manifest import SPLITS
from k2jax.data.store.writer import PartWriter, merge_parts
from k2jax.data.text import dedup
from k2jax.data.text.filters import make_filters
from k2jax.data.text.job import Meter, Recipe, read_result, result, results, run_rank
from k2jax.data.text.provenance import Origins, rephrased_sources
from k2jax.data.text.readers import Record, records
from k2jax.data.text.sources import File, Tally
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_vocab
from k2jax.errors import UserError
from k2jax.files import write_sealed

_MAX_MATCH_RANKS = 1000


def split_hash(digest: bytes) -> float:
    """In [0, 1), by the content alone: below `validation_fraction` is validation, whatever stands beside it.

    digest: sha256 of a document's text; of a rephrased one, of the original's text.
    """
    return int.from_bytes(digest[:8], "big") / 2**64


def _records(recipe: Recipe, rank: int, skipped: Tally, bad: Tally, meter: Meter) -> Iterator[tuple[File, Record]]:
    """Every record of a rank; the meter gets the bytes of files, of the one being read as far as its text says."""
    for file in recipe.files_of(rank):
        seen = 0
        for record in records(file, recipe.text_field, skipped, bad):
            yield file, record
            part = min(len(record.text), file.size - seen)
            seen += part
            meter.add(file_bytes=part)
        meter.add(file_bytes=file.size - seen)


def _reason_to_skip(record: Record, filters: list, meter: Meter) -> str | None:
    if not record.text:
        return "empty"
    for rule in filters:
        with meter.timed(rule.name):
            reason = rule.reason(record)
        if reason is not None:
            return reason
    return None


def _read(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    skipped, bad = Tally(), Tally(num_examples=10)
    filters = make_filters(tuple(recipe.filters), recipe.min_chars, recipe.max_chars)
    digests, signatures, ordinals, places, origins = [], [], [], [], Origins()
    for ordinal, (file, record) in enumerate(_records(recipe, rank, skipped, bad, meter)):
        try:
            content = record.text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            skipped.add("not UTF-8", record.name)
            continue
        meter.add(documents=1, text_bytes=len(content))
        if (reason := _reason_to_skip(record, filters, meter)) is not None:
            skipped.add(reason, record.name)
            continue
        digest = hashlib.sha256(content).digest()
        if recipe.near_duplicates is not None:
            with meter.timed("fingerprint"):
                signatures.append(dedup.signature(record.text))
        digests.append(digest)
        ordinals.append(ordinal)
        origins.add(file.source, record)
        places.append(split_hash(bytes.fromhex(record.origin["sha256"]) if record.origin else digest))
    near = None if recipe.near_duplicates is None else np.array(signatures, np.uint32).reshape(-1, dedup.NUM_HASHES)
    dedup.write_index(folder, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), near)
    np.save(folder / "ordinals.npy", np.array(ordinals, np.uint32))
    np.save(folder / "places.npy", np.array(places, np.float64))
    origins.save(folder)
    write_sealed(folder / "tally.json", {"skipped": skipped.reasons, "bad": bad.reasons})


def _match(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    folders = results(work, "read", len(recipe.ranks))
    exact, near = dedup.find_pairs(folders, rank, num_ranks(recipe, "match"), recipe.near_duplicates)
    np.save(folder / "exact.npy", exact)
    np.save(folder / "near.npy", near)


def _resolve(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    found = results(work, "match", num_ranks(recipe, "match"))
    exact, near = (np.concatenate([np.load(path / f"{kind}.npy") for path in found]) for kind in ("exact", "near"))
    counts = [len(np.load(path / "ordinals.npy", mmap_mode="r")) for path in results(work, "read", len(recipe.ranks))]
    is_exact, is_near = dedup.resolve(sum(counts), exact, near)
    fates = np.where(is_exact, np.uint8(1), np.where(is_near, np.uint8(2), np.uint8(0)))
    for number, part in enumerate(np.split(fates, np.cumsum(counts)[:-1])):
        np.save(folder / f"{number:05d}.npy", part)
    rephrased = rephrased_sources(results(work, "read", len(recipe.ranks)))
    write_sealed(folder / "rephrased.json", {"sources": rephrased})


_FATES = (None, "duplicate", "near-duplicate")


def fates(work: Path, rank: int) -> np.ndarray:
    """uint8 per document that passed the filters of a rank: 0 stays, 1 a duplicate, 2 a near duplicate."""
    return np.load(result(work, "resolve", 0) / f"{rank:05d}.npy")


def _kept(recipe: Recipe, work: Path, rank: int, skipped: Tally, meter: Meter) -> Iterator[tuple[File, Record, float]]:
    """(file, record, place) of the documents that stay; UserError if the files have changed since they were read."""
    folder = result(work, "read", rank)
    ordinals, places, digests = (np.load(folder / f"{name}.npy") for name in ("ordinals", "places", "digests"))
    fate, row = fates(work, rank), 0
    for ordinal, (file, record) in enumerate(_records(recipe, rank, Tally(), Tally(), meter)):
        if row == len(ordinals) or ordinal != ordinals[row]:
            continue
        if hashlib.sha256(record.text.encode("utf-8", "replace")).digest() != digests[row].tobytes():
            raise UserError(f"{file.path}: has changed while it was being prepared; start again")
        if (reason := _FATES[fate[row]]) is None:
            yield file, record, places[row]
        else:
            skipped.add(reason, record.name)
        row += 1
    if row < len(ordinals):
        raise UserError(f"{recipe.files_of(rank)[-1].path}: has changed while it was being prepared; start again")


def save_tokenizer_copy(folder: Path, tokenizer: Tokenizer) -> None:
    """Write what `tokenizer_copy` reads; the folder must exist."""
    if tokenizer.definition is not None:
        (folder / tokenizer.file_name).write_bytes(tokenizer.definition)
    write_sealed(folder / "spec.json", {"spec": tokenizer.spec, "file_name": tokenizer.file_name})


def tokenizer_copy(work: Path) -> Tokenizer:
    """The tokenizer of the preparation, which needs no other file than the work folder's."""
    folder = result(work, "tokenizer", 0)
    kept = read_result(folder / "spec.json")
    name = kept["file_name"]
    return replace(load_tokenizer("byte" if name is None else str(folder / name)), spec=kept["spec"])


def _tokenizer(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    vocab = train_vocab(recipe.tokenizer)
    if vocab is None:
        chosen = load_tokenizer(recipe.tokenizer)
        if chosen.digest != recipe.tokenizer_digest:
            raise UserError(f"tokenizer = {recipe.tokenizer!r}: has changed since the preparation began; start again")
    else:
        documents = (kept for r in range(len(recipe.ranks)) for kept in _kept(recipe, work, r, Tally(), meter))
        chosen = train_bpe((d.text for _, d, place in documents if place >= recipe.validation_fraction), vocab)
    save_tokenizer_copy(folder, chosen)


def _write(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    sizes = {"shard_tokens": recipe.shard_tokens, "chunk_tokens": recipe.chunk_tokens}
    writer, skipped = PartWriter(folder, rank, tokenizer_copy(work), **sizes), Tally()
    for file, record, place in _kept(recipe, work, rank, skipped, meter):
        before, origin = writer.num_tokens, record.origin
        origin = origin and {"name": origin["name"], "sha256": origin["sha256"]}
        split = SPLITS[int(place < recipe.validation_fraction)]
        with meter.timed("tokenise"):
            size = writer.append(split, file.source, record.name, record.text, origin)
        meter.add(documents=1, text_bytes=size, tokens=writer.num_tokens - before)
    writer.finish()
    write_sealed(folder / "tally.json", {"skipped": skipped.reasons})


def left_out(recipe: Recipe, work: Path, *tasks: str) -> Tally:
    """Counts of what was left out before the tasks, and by them."""
    skipped = Tally()
    skipped.merge(recipe.skipped)
    for task in tasks:
        for folder in results(work, task, len(recipe.ranks)):
            tally = read_result(folder / "tally.json")
            skipped.merge(tally["skipped"])
            skipped.merge({f"bad {reason}": entry for reason, entry in tally.get("bad", {}).items()})
    return skipped


def _move(path: Path, target: Path) -> None:
    """Move a file or folder, unless an earlier try has done so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(path, target)
    except OSError:
        if not target.exists():
            raise


def _merge(recipe: Recipe, work: Path, rank: int, folder: Path, meter: Meter) -> None:
    """The parts are where their writers have put them; moving them together needs no copy."""
    store = work / "store"
    for part in results(work, "write", len(recipe.ranks)):
        for path in [*part.glob("parts/*.json"), *(path for split in SPLITS for path in part.glob(f"{split}/*/*"))]:
            _move(path, store / path.relative_to(part))
    created = {
        "source": recipe.sources,
        "pattern": recipe.pattern,
        "exclude": recipe.exclude,
        "validation_fraction": recipe.validation_fraction,
        "text_field": recipe.text_field,
        "skip_bad_lines": recipe.skip_bad_lines,
        "min_chars": recipe.min_chars,
        "max_chars": recipe.max_chars,
        "filters": recipe.filters,
        "near_duplicates": recipe.near_duplicates,
        "versions": recipe.versions,
        "skipped": left_out(recipe, work, "read", "write").reasons,
    }
    rephrased = read_result(result(work, "resolve", 0) / "rephrased.json")["sources"]
    merge_parts(store, len(recipe.ranks), tokenizer_copy(work), rephrased, **created)


_TASKS: dict[str, Callable] = {
    "read": _read,
    "match": _match,
    "resolve": _resolve,
    "tokenizer": _tokenizer,
    "write": _write,
    "merge": _merge,
}
TASKS = tuple(_TASKS)


def num_ranks(recipe: Recipe, task: str) -> int:
    """Of the recipe alone, never of the executor, so that results do not depend on it."""
    return {
        "read": len(recipe.ranks),
        "write": len(recipe.ranks),
        "match": min(len(recipe.ranks), _MAX_MATCH_RANKS),
    }.get(task, 1)


def run_task_rank(work: str, task: str, rank: int) -> None:
    """Run one rank of a task; executors call it on any machine that sees the work folder."""
    run_rank(Path(work), task, rank, _TASKS[task])
