"""time.jsonl of a run: every second of its starts by what it was spent on, and the share that moved the model.

A line holds the seconds of one start so far, so that its last line is its account, and what a start has lost is known
from the step at which the next one goes on. Times inside a start are of the monotonic clock. Needs no jax.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k2jax.errors import UserError
from k2jax.files import naming
from k2jax.runs.records import read_records, to_line

# Inside a start. Between starts "restart"; steps that a later start repeated are "lost work" and no longer "step".
KINDS = ("step", "start", "restore", "compile", "data wait", "save stall", "evaluation", "hang", "lost work", "restart")
FLUSH_SECONDS = 30  # what a killed start leaves unknown of its end, at most; counted as "restart"


class TimeLog:
    """The clock of one start: always running, on the innermost of the kinds it was told. Without a path nothing is kept.

    step: steps that were done before this start. watch(kind): called whenever the kind changes, also to the same again.
    """

    def __init__(self, path: Path | None, step: int, watch: Callable[[str], None] = lambda kind: None):
        self._path, self._step, self._seconds, self._watch = path, step, Counter(), watch
        self._kinds, self._since, self._flushed = ["start"], time.monotonic(), time.monotonic()
        watch("start")
        if path is not None:
            starts = read_records(path, ordered=False)
            self._start = 1 + (starts[-1]["start"] if starts else 0)
            self._file = open(path, "a", encoding="utf-8")
            self.flush(step)

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._kinds[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Time that passes inside is of this kind, and not of the one around."""
        self._settle()
        self._kinds.append(kind)
        self._watch(kind)
        try:
            yield
        finally:
            self._settle()
            self._kinds.pop()
            self._watch(self._kinds[-1])

    def begin_steps(self) -> None:
        """Time that no `spent_on` names is "start" until here, and "step" from here on."""
        self._settle()
        self._kinds[0] = "step"
        self._watch(self._kinds[-1])

    def flush(self, step: int, ended: bool = False) -> None:
        """Write the account so far, `step` steps being done. OSError, with the file's name, if the disk is full."""
        self._settle()
        self._step, self._flushed = step, self._since
        if self._path is None:
            return
        seconds = {kind: round(value, 3) for kind, value in self._seconds.items()}
        record = {"step": step, "start": self._start, "unix": round(time.time(), 3), "seconds": seconds, "ended": ended}
        with naming(self._path):
            self._file.write(to_line(record))
            self._file.flush()

    def tick(self, step: int) -> None:
        """`flush`, if the last one is FLUSH_SECONDS ago."""
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush(step)

    def hung(self) -> None:
        """The last line, by another thread than the one that is stuck: the time since the kind last changed went to nothing."""
        self._kinds.append("hang")
        self.close()

    def close(self) -> None:
        """The last line: this start came to an end of its own, good or bad."""
        if self._path is not None:
            with self._file:
                self.flush(self._step, ended=True)


@dataclass(frozen=True)
class Start:
    """One start of a run. first, last: steps done at its first and last line; unix: seconds since 1970, of both.

    seconds: by kind, "lost work" being those of its steps from `kept` on, which a later start did again.
    """

    first: int
    last: int
    kept: int
    unix: tuple[float, float]
    ended: bool
    seconds: dict[str, float]


def _step_seconds(lines: list[dict], step: int) -> float:
    """Seconds of "step" when `step` steps were done; between two lines in proportion."""
    before, spent = lines[0], lambda line: line["seconds"].get("step", 0.0)
    for line in lines:
        if line["step"] >= step:
            share = (step - before["step"]) / max(line["step"] - before["step"], 1)
            return spent(before) + min(max(share, 0), 1) * (spent(line) - spent(before))
        before = line
    return spent(lines[-1])


def _check(path: Path, records: list[dict]) -> None:
    for record in records:
        kinds = {"start": int, "unix": float, "seconds": dict, "ended": bool}
        if wrong := [name for name, kind in kinds.items() if type(record.get(name)) is not kind]:
            raise UserError(f"{path}: is not a run's account of time: {', '.join(wrong)} missing or of another type")


def read_starts(path: Path) -> list[Start]:
    """The starts of a run, oldest first. UserError if there is none, or a line is not as it was written."""
    records = read_records(path, ordered=False)
    _check(path, records)
    if not records:
        raise UserError(f"{path}: no start of this run has kept an account of its time")
    groups: dict[int, list[dict]] = {}
    for record in records:
        groups.setdefault(record["start"], []).append(record)
    starts, resumed = [], None  # at which step the starts after this one went on, the earliest of them
    for lines in reversed(groups.values()):
        first, last = lines[0], lines[-1]
        seconds = Counter(last["seconds"])
        kept = last["step"] if resumed is None else max(min(resumed, last["step"]), first["step"])
        if kept < last["step"]:
            lost = seconds["step"] - _step_seconds(lines, kept)
            seconds.update({"step": -lost, "lost work": lost})
        unix = first["unix"], last["unix"]
        starts.append(Start(first["step"], last["step"], kept, unix, last["ended"], dict(seconds)))
        resumed = first["step"] if resumed is None else min(resumed, first["step"])
    return starts[::-1]


def account(starts: list[Start]) -> dict[str, float]:
    """Seconds by kind, in the order of KINDS, from the first start to the last line of the last one."""
    total = Counter(dict.fromkeys(KINDS, 0.0))
    for start in starts:
        total.update(start.seconds)
    for before, after in zip(starts, starts[1:], strict=False):
        total["restart"] += max(after.unix[0] - before.unix[1], 0.0)  # a clock that was set back counts as nothing
    return dict(total)
