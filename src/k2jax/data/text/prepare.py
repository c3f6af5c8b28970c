"""Documents to a token store: read, filter, drop duplicates, split by content, tokenise, write.

A document belongs to validation by a hash of its content, a rephrased one by that of its source: the same text is
always on the same side, whatever the order or the other documents. What is left out is counted by reason, in the
summary and in the manifest.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from k2jax.data.store.manifest import CHUNK_TOKENS, SHARD_TOKENS, SPLITS, parse_manifest
from k2jax.data.text import dedup, filters
from k2jax.data.text.executors import executor_problems, run_task
from k2jax.data.text.job import FORMAT, Recipe, cut_into_ranks, read_result, result, save_recipe
from k2jax.data.text.progress import Progress, costs_of, watched
from k2jax.data.text.readers import choose_files
from k2jax.data.text.sources import EXTRA, Tally, path_problems, refuse_bad, source_and_path
from k2jax.data.text.tasks import TASKS, fates, left_out
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, train_vocab
from k2jax.errors import UserError
from k2jax.files import is_url, locked, sync_file
from k2jax.words import counted

RANK_BYTES = 2**26


def _source_problems(specs: list[str], out: Path):
    yield from path_problems(specs)
    for _, path in map(source_and_path, specs):
        if not is_url(path) and os.path.isdir(path) and out.resolve().is_relative_to(Path(path).resolve()):
            yield f"out = {str(out)!r}: must not lie inside source = {path!r}; name a folder outside"


def _argument_problems(out: Path, recipe: dict):
    if is_url(out):
        yield f"out = {str(out)!r}: must be a folder, not a URL; copy the store there when it is made"
    elif "," in str(out) or str(out).startswith("~"):
        rule = "must not have a comma, which joins stores in data.path" if "," in str(out) else "~ is not expanded here"
        nearest = str(Path(str(out).replace(",", "-")).expanduser())
        yield f"out = {str(out)!r}: {rule}; nearest: {nearest!r}"
    elif os.path.lexists(out):
        yield f"out = {str(out)!r}: exists already; name a new folder, or remove this one"
    fraction, least, most = recipe["validation_fraction"], recipe["min_chars"], recipe["max_chars"]
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        yield f"validation_fraction = {fraction!r}: must be above 0 and below 1; 0.02 is usual"
    if least < 1:
        yield f"min_chars = {least}: must be at least 1"
    if most is not None and most < least:
        yield f"max_chars = {most}: must be at least min_chars = {least}"
    if recipe["skip_bad_lines"] < 0:
        yield f"skip_bad_lines = {recipe['skip_bad_lines']}: must be at least 0"
    for name in recipe["filters"]:
        if name not in filters.KINDS:
            yield f"filters: {name!r} must be one of {', '.join(filters.KINDS)}"
    near = recipe["near_duplicates"]
    if near is not None and not dedup.LEAST_THRESHOLD <= near <= 1:
        rule = f"must be at least {dedup.LEAST_THRESHOLD} and at most 1, a Jaccard similarity; 0.8 is usual"
        yield f"near_duplicates = {near}: {rule}"
    for what, module, wanted in (("filters", "datatrove", recipe["filters"]), ("near_duplicates", "rensa", near)):
        if wanted and importlib.util.find_spec(module) is None:
            yield f"{what} = {wanted}: needs {module}; {EXTRA}"


def _tokenizer_or_problems(spec: str) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """None without problems stands for one yet to be trained."""
    try:
        return (load_tokenizer(spec) if train_vocab(spec) is None else None), ()
    except UserError as error:
        return None, error.problems


def _versions(recipe: dict) -> dict[str, str]:
    used = {"datatrove": recipe["filters"], "rensa": recipe["near_duplicates"]}
    return {name: importlib.metadata.version(name) for name, wanted in used.items() if wanted}


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` in which it is prepared; a lock keeps others away, and dies with this process."""
    work = out.with_name(f".{out.name}.k2jax-partial")
    with contextlib.ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(locked(work, os.O_RDONLY))
        except OSError as error:
            raise UserError(f"out = {str(out)!r}: cannot be made: {error.strerror}; name another folder") from None
        try:  # another one may have finished, and removed the folder, between our opening and locking it
            mine = descriptor is not None and os.path.samestat(os.fstat(descriptor), os.stat(work))
        except OSError:
            mine = False
        if not mine or out.exists():
            raise UserError(f"out = {str(out)!r}: another prepare is writing it; wait for it, or name another folder")
        yield work


def _refuse_bad(work: Path, recipe: Recipe) -> None:
    """UserError for the lines and files of all ranks that could not be read."""
    bad = Tally(num_examples=10)
    for rank in range(len(recipe.ranks)):
        bad.merge(read_result(result(work, "read", rank) / "tally.json")["bad"])
    refuse_bad(bad, recipe.skip_bad_lines)


def _refuse_lopsided(work: Path, recipe: Recipe) -> None:
    """UserError unless both splits have a document."""
    ranks = range(len(recipe.ranks))
    places = [np.load(result(work, "read", rank) / "places.npy")[fates(work, rank) == 0] for rank in ranks]
    places, fraction = np.concatenate([np.empty(0), *places]), recipe.validation_fraction
    held_out = int((places < fraction).sum())
    counts = [len(places) - held_out, held_out]
    if all(counts):
        return
    source = recipe.sources[0] if len(recipe.sources) == 1 else recipe.sources
    reasons = ", ".join(
        f"{entry['count']} {reason}" for reason, entry in left_out(recipe, work, "read").reasons.items()
    )
    besides = f" (left out: {reasons})" if reasons else ""
    if not any(counts) and all(Path(source_and_path(spec)[1]).is_file() for spec in recipe.sources):
        raise UserError(f"source = {source!r}: holds no document{besides}; name other files")
    if not any(counts):
        rule = f"no document matches pattern = {recipe.pattern!r}{besides}"
        if "/" not in recipe.pattern and not recipe.pattern.startswith("**"):
            rule += f", which means files at the top of a folder alone; '**/{recipe.pattern}' finds them below it, too"
        raise UserError(f"source = {source!r}: {rule}; change one of them")
    if sum(counts) == 1:
        raise UserError(
            f"source = {source!r}: holds one document{besides}, but training and validation need one each; "
            "split it into files, or into the lines of a .jsonl"
        )
    found = f"validation_fraction = {fraction}: leaves none of {counted(sum(counts), 'document')} for {SPLITS[counts.index(0)]}"
    fits = f"above {places.min():.6g} and at most {places.max():.6g}"
    raise UserError(f"{found}; for these documents it must be {fits}")


def _run(work: Path, recipe: Recipe, executor: tuple, progress: Callable[[Progress], None] | None) -> None:
    """All tasks, one after the other."""
    if not recipe.ranks:
        _refuse_lopsided(work, recipe)
    for task in TASKS:
        with watched(work, recipe, task, progress):
            run_task(*executor, recipe, work, task)
        if task == "read":
            _refuse_bad(work, recipe)
        if task == "resolve":
            _refuse_lopsided(work, recipe)


def _recipe(
    specs: list[str], out: Path, values: dict, rank_bytes: int, executor: tuple
) -> tuple[Recipe, Tokenizer | None]:
    """UserError with every problem that the arguments alone show, then with those of the files."""
    chosen, problems = _tokenizer_or_problems(values["tokenizer"])
    problems = [*_source_problems(specs, out), *_argument_problems(out, values), *problems]
    problems += executor_problems(*executor)
    if problems:
        raise UserError(*problems)
    skipped = Tally()
    files = choose_files(specs, values["pattern"], tuple(values["exclude"]), values["text_field"], skipped)
    recipe = Recipe(
        format=FORMAT,
        sources=specs,
        tokenizer_digest=chosen.digest if chosen else None,
        versions=_versions(values),
        files=[[*file] for file in files],
        ranks=cut_into_ranks(files, rank_bytes),
        skipped=skipped.reasons,
        **values,
    )
    return recipe, chosen


def _finish(work: Path, out: Path) -> dict:
    """Move the finished store to `out`, remove the rest, and say what was made."""
    costs, content = costs_of(work), (work / "store/manifest.json").read_bytes()
    manifest = parse_manifest(str(work / "store/manifest.json"), content)
    os.rename(work / "store", out)
    sync_file(out.parent)
    shutil.rmtree(work, ignore_errors=True)
    summary = {key: manifest[key] for key in manifest if key != "files"}
    return {"path": str(out), "digest": hashlib.sha256(content).hexdigest(), **summary, "tasks": costs}


def prepare(
    source: str | list[str],
    out: str,
    tokenizer: str,
    *,
    pattern: str = "**/*",
    exclude: tuple[str, ...] = (),
    validation_fraction: float = 0.02,
    text_field: str = "text",
    skip_bad_lines: int = 0,
    min_chars: int = 1,
    max_chars: int | None = None,
    filters: tuple[str, ...] = (),
    near_duplicates: float | None = None,
    executor: str = "local",
    workers: int = 1,
    executor_options: dict[str, str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    rank_bytes: int = RANK_BYTES,
    shard_tokens: int = SHARD_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict:
    """Make the token store `out` and return its manifest without the files, with "path", "digest" and "tasks".

    source: folders, files and URLs, each alone or as NAME=PATH, where NAME is the source that the store records. The
    suffix says how a file is read (readers.py): .jsonl has a document in each line in the field `text_field`, .parquet
    in each row, all also compressed (.gz, .bz2, .xz, .zst); every other file in a folder is one document, unless it is
    above 1 MiB; that, and a text named by itself, is cut at line ends into documents of 16 KiB or more. skip_bad_lines:
    lines that may be left out because they cannot be read; more are an error. `pattern` and `exclude` (`**/`, `*`, `?`)
    choose files in folders, by their path in there; hidden ones only if the pattern names them.
    tokenizer: "byte", a .tiktoken file, a tokenizer.json, or "train:VOCAB", trained on the training split.
    filters: of filters.KINDS. near_duplicates: the Jaccard similarity of two documents' sets of 5 words from which the
    later one is left out. executor: see executors.py; the result does not depend on it, nor on `workers`.

    After a kill, or an error that is nobody's mistake, the same call goes on where it stood. UserError, and nothing
    left behind, for arguments and lines that cannot be, and where training or validation would have no document.
    """
    specs = [str(s) for s in ([source] if isinstance(source, (str, Path)) else source)]
    values = {
        "pattern": pattern,
        "exclude": [exclude] if isinstance(exclude, str) else [*exclude],
        "text_field": text_field,
        "skip_bad_lines": skip_bad_lines,
        "validation_fraction": validation_fraction,
        "min_chars": min_chars,
        "max_chars": max_chars,
        "filters": [*filters],
        "near_duplicates": near_duplicates,
        "tokenizer": tokenizer,
        "shard_tokens": shard_tokens,
        "chunk_tokens": chunk_tokens,
    }
    runner = (executor, workers, dict(executor_options or {}))
    recipe, chosen = _recipe(specs, Path(out), values, rank_bytes, runner)
    with _work_folder(Path(out)) as work:
        save_recipe(work, recipe)
        try:
            _run(work, recipe, runner, progress)
        except UserError:
            shutil.rmtree(work)
            raise
        return _finish(work, Path(out))
