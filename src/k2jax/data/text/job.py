"""A preparation under way: its recipe, and its tasks, whose results lie in a folder.

A task runs as ranks, each for a share of the files or keys. A rank is a pure function of the recipe and of earlier
tasks' results. It writes into a folder of its own and renames it to TASK/RANK when it is done, so that a result is there
whole or not at all: after a kill the ranks without one run again, wherever, even twice at once, and give the same bytes.

recipe.json   what is prepared and how, the files and their cut into ranks
TASK/RANK/    results, one folder per rank
progress/     what each rank has done so far, and at last its cost
errors/       why a rank failed

All of these carry their own sha256. A result that has changed is an error that names it: it would change the store.
"""

import contextlib
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from k2jax.data.text.sources import File
from k2jax.errors import RunFailed, UserError
from k2jax.files import parse_json, read_sealed, sealed, sync_file, unsealed, write_atomic, write_sealed

FORMAT = 1
_MAX_RANKS, _MAX_FILES = 10_000, 4096
_SECONDS_BETWEEN_REPORTS = 0.5


@dataclass(frozen=True)
class Recipe:
    """All that the result depends on, as JSON values; `ranks` are [first, last + 1) of `files`."""

    format: int
    sources: list[str]
    pattern: str
    exclude: list[str]
    text_field: str
    skip_bad_lines: int
    validation_fraction: float
    min_chars: int
    max_chars: int | None
    filters: list[str]
    near_duplicates: float | None
    tokenizer: str
    tokenizer_digest: str | None  # None: trained on the way
    shard_tokens: int
    chunk_tokens: int
    versions: dict[str, str]  # of libraries that decide what stays
    files: list[list]
    ranks: list[list[int]]
    skipped: dict  # before any task: what was found and left out

    def files_of(self, rank: int) -> list[File]:
        start, stop = self.ranks[rank]
        return [File(*entry) for entry in self.files[start:stop]]


def cut_into_ranks(files: list[File], least_bytes: int) -> list[list[int]]:
    """Consecutive files of at least `least_bytes` together; more where that would be over 10,000 ranks."""
    least_bytes = max(least_bytes, -(-sum(file.size for file in files) // _MAX_RANKS))
    ranks, start, size = [], 0, 0
    for number, file in enumerate(files, 1):
        size += file.size
        if size >= least_bytes or number - start == _MAX_FILES:
            ranks.append([start, number])
            start, size = number, 0
    return [*ranks, [start, len(files)]] if start < len(files) else ranks


def _differences(old: dict, new: dict) -> Iterator[str]:
    for name in [field.name for field in fields(Recipe)]:
        if old.get(name) == new[name] or name in ("ranks", "skipped"):
            continue
        if name == "files":
            before, now = ({(e[0], e[2]): list(e) for e in files} for files in (old["files"], new["files"]))
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            many = f"{len(changed)} of its files are not as they were, such as {changed[0][1]}" if changed else None
            yield f"source: {many or 'its files come in another order, or number, than they did'}"
        else:
            yield f"{name} = {new[name]!r}: was {old.get(name)!r} when it began"


def _read_recipe(work: Path) -> dict:
    """The values of recipe.json, of any size: it names every file. UserError if it is not what was written."""
    path, hint = work / "recipe.json", f"remove {work} to start again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {hint}") from None
    return unsealed(path, parse_json(path, content, hint), hint)


def save_recipe(work: Path, recipe: Recipe) -> None:
    """Write the recipe, or find the same one. UserError if another one was begun, or it cannot be read."""
    path, new = work / "recipe.json", json.loads(json.dumps(asdict(recipe)))
    if os.path.lexists(path):
        old = _read_recipe(work)
        if old != new:
            hint = f"an unfinished preparation is in {work}; repeat it as it was, or remove the folder to start again"
            raise UserError(*_differences(old, new), hint)
        return
    for name in ("progress", "errors"):
        (work / name).mkdir(exist_ok=True)
    write_atomic(path, json.dumps(sealed(new)))


def load_recipe(work: Path) -> Recipe:
    """The recipe that `save_recipe` wrote. UserError if it cannot be read."""
    return Recipe(**_read_recipe(work))


def read_result(path: Path) -> dict:
    """The values of a rank's result file, written by `write_sealed`.

    RunFailed if they are not what was written: not a UserError, after which the other results would be removed.
    """
    hint = f"remove {path.parent} and repeat the same command"
    try:
        return read_sealed(path, hint)
    except UserError as error:
        message = str(error)
        raise RunFailed(message if message.endswith(hint) else f"{message}; {hint}") from None


def read_report(path: Path) -> dict | None:
    """A file of progress/ or errors/; None if it is missing or damaged: a store does not depend on it."""
    try:
        return read_sealed(path)
    except UserError:
        return None


class Meter:
    """Counts of a rank's work, and seconds by the name of what took them."""

    def __init__(self, path: Path):
        self.path, self.counts, self.seconds = path, {}, {}
        self.started, self.reported = time.process_time(), time.monotonic()

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        if time.monotonic() - self.reported > _SECONDS_BETWEEN_REPORTS:
            self.report(False)

    @contextlib.contextmanager
    def timed(self, name: str):
        """Count this thread's seconds under `name`."""
        started = time.thread_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started

    def report(self, done: bool) -> None:
        self.reported = time.monotonic()
        total = time.process_time() - self.started
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        values = {**self.counts, "seconds": self.seconds, "total": total, "done": done}
        temporary.write_text(json.dumps(sealed(values)))
        os.replace(temporary, self.path)


def result(work: Path, task: str, rank: int) -> Path:
    return work / task / f"{rank:05d}"


def results(work: Path, task: str, num_ranks: int) -> list[Path]:
    return [result(work, task, rank) for rank in range(num_ranks)]


def unfinished(work: Path, task: str, num_ranks: int) -> list[int]:
    """Ranks of a task without a result."""
    done = {entry.name for entry in os.scandir(work / task)} if (work / task).is_dir() else set()
    return [rank for rank in range(num_ranks) if f"{rank:05d}" not in done]


def _publish(temporary: Path, final: Path) -> None:
    """Make a rank's folder durable, then its result; where another got there first, its equal stays."""
    for root, _, names in os.walk(temporary):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_file(Path(root))
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary)
    sync_file(final.parent)


def run_rank(work: Path, task: str, rank: int, function: Callable[[Recipe, Path, int, Path, Meter], None]) -> None:
    """Run one rank unless its result is there. What it raises is also written down, for whoever started the task."""
    final = result(work, task, rank)
    if final.is_dir():
        return
    final.parent.mkdir(exist_ok=True)  # not the work folder itself: it is gone once another has finished
    temporary = final.with_name(f"{rank:05d}.{socket.gethostname()}-{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    meter = Meter(work / "progress" / f"{task}-{rank:05d}.json")
    try:
        function(load_recipe(work), work, rank, temporary, meter)
    except Exception as error:
        problems = [*error.problems] if isinstance(error, UserError) else None
        content = {"problems": problems, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        write_sealed(work / "errors" / f"{task}-{rank:05d}.json", content)
        raise
    meter.report(True)
    _publish(temporary, final)
