"""Progress and costs of a preparation, from the reports of its ranks, wherever they run."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.data.text.job import Recipe, read_report
from k2jax.data.text.tasks import TASKS, num_ranks

_SECONDS = 0.5


class Progress(NamedTuple):
    """Progress of a task, all its ranks together."""

    task: str
    ranks: tuple[int, int]  # done, of
    documents: int
    text_bytes: int
    tokens: int
    file_bytes: tuple[int, int]  # read, of; 0 where a task reads no documents
    seconds: float  # since this process began the task
    before: tuple[int, int, int, int]  # documents, text_bytes, tokens and file_bytes done by earlier ones


class _Watch(threading.Thread):
    """Calls `progress` twice a second with what the ranks of a task have reported."""

    def __init__(self, work: Path, recipe: Recipe, task: str, progress: Callable[[Progress], None]):
        super().__init__(daemon=True)
        self.work, self.recipe, self.task, self.progress = work, recipe, task, progress
        self.stopped, self.started, self.done = threading.Event(), time.monotonic(), {}
        self.total = sum(file[3] for file in recipe.files) if task in ("read", "tokenizer", "write") else 0
        self.before = self._sums()[1:]

    def _sums(self) -> tuple[int, int, int, int, int]:
        """(ranks done, documents, text_bytes, tokens, file_bytes)."""
        running = {}
        for path in (self.work / "progress").glob(f"{self.task}-*.json"):
            if path.name not in self.done:
                if (found := read_report(path)) is not None:
                    (self.done if found["done"] else running)[path.name] = found
        entries = [*self.done.values(), *running.values()]
        names = ("documents", "text_bytes", "tokens", "file_bytes")
        return len(self.done), *(sum(entry.get(name, 0) for entry in entries) for name in names)

    def show(self) -> None:
        done, documents, text_bytes, tokens, file_bytes = self._sums()
        ranks, seconds = (done, num_ranks(self.recipe, self.task)), time.monotonic() - self.started
        sizes = (file_bytes, self.total)
        self.progress(Progress(self.task, ranks, documents, text_bytes, tokens, sizes, seconds, self.before))

    def run(self) -> None:
        while not self.stopped.wait(_SECONDS):
            self.show()

    def stop(self) -> None:
        self.stopped.set()
        self.join()
        self.show()


@contextlib.contextmanager
def watched(work: Path, recipe: Recipe, task: str, progress: Callable[[Progress], None] | None) -> Iterator[None]:
    """Have `progress` called, if there is one, while a task runs, and once when it has ended."""
    if progress is None:
        yield
        return
    watch = _Watch(work, recipe, task, progress)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def costs_of(work: Path) -> dict[str, dict]:
    """By task: counts, CPU seconds of all ranks, and of them by the name of what took them.

    "unreadable" counts reports that are damaged, as after a power cut, so that the figures lack their ranks.
    """
    tasks = {}
    for task in TASKS:
        entry = tasks.setdefault(task, {"cpu_seconds": 0.0, "parts": {}})
        for path in sorted((work / "progress").glob(f"{task}-*.json")):
            if (found := read_report(path)) is None:
                entry["unreadable"] = entry.get("unreadable", 0) + 1
                continue
            entry["cpu_seconds"] += found["total"]
            for name, seconds in found["seconds"].items():
                entry["parts"][name] = entry["parts"].get(name, 0.0) + seconds
            for name in ("documents", "text_bytes", "tokens"):
                entry[name] = entry.get(name, 0) + found.get(name, 0)
    return tasks
