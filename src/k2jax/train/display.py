"""The display of a run: live on a terminal, plain lines elsewhere."""

import collections
import contextlib
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column


def short(value: float) -> str:
    """Three digits and a unit: 850, 8.97k, 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g}{unit}".replace(f".{unit}", unit)
    return f"{value:.3g}"


def describe(record: dict, width: int) -> str:
    """One step in one line of at most `width` columns; the least useful fields are dropped first."""
    heads = ", ".join(record["clipped_heads"][:4]) + (", ..." if record["heads_clipped"] > 4 else "")
    loss, logit, grad = (math.nan if record[n] is None else record[n] for n in ("loss", "max_logit", "grad_norm"))
    fields = [  # (text, how soon it is dropped)
        (f"loss {loss:6.4f}", 0),
        (f"grad {grad:6.3f}", 3),
        (f"lr {record['learning_rate']:.2e}", 5),
        (f"{short(record['tokens_per_second']):>5} tok/s", 1),
        (f"{record['matmul_share']:3.0%} mm", 4),
        (f"max logit {logit:6.2f}", 2),
        (f"clipped {record['heads_clipped']}", 6),
        (f"({heads})", 7) if heads else ("", 8),
    ]
    while len(fields) > 1 and (not fields[-1][0] or len("  ".join(text for text, _ in fields)) > width):
        fields.remove(max(fields, key=lambda field: field[1]))
    return "  ".join(text for text, _ in fields)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Prints banner, phases of the start and steps. `log_every`: steps between plain lines; a terminal shows each."""

    def __init__(self, first_step: int, num_steps: int, log_every: int, console: Console | None = None):
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._log_every, self._num_steps = log_every, num_steps
        self._seconds = collections.deque(maxlen=50)  # of the latest steps: validations and saves are not in them
        self._live = None
        if self._console.is_terminal:
            width, counter = self._console.width, 2 * len(f"{num_steps:,}") + 1
            bar = [BarColumn(10)] if width >= 80 else []
            columns = [MofNCompleteColumn(table_column=Column(no_wrap=True)), *bar, TextColumn("{task.fields[eta]:>7}")]
            self._live = Progress(TextColumn("step"), *columns, TextColumn("{task.description}"), console=self._console)
            self._width = width - 5 - (counter + 1) - 8 - (11 if bar else 0)  # what the other columns leave
            self._task = self._live.add_task("", total=num_steps, completed=first_step, eta="")

    def _eta(self, done: int) -> str:
        """Time to the last step at the mean rate of the latest ones."""
        return _duration(sum(self._seconds) / len(self._seconds) * (self._num_steps - done))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
        sys.stdout.flush()

    @contextlib.contextmanager
    def phase(self, name: str):
        """A named part of the start, with its time and the notes appended to the list; a clock on a terminal."""
        started, notes = time.monotonic(), []
        clock = Progress(SpinnerColumn(), TextColumn(name), TimeElapsedColumn(), console=self._console, transient=True)
        with clock if self._console.is_terminal else contextlib.nullcontext():
            if self._console.is_terminal:
                clock.add_task(name, total=None)
            yield notes
        self.say(", ".join([f"{name}: {time.monotonic() - started:.1f} s", *notes]))

    def step(self, record: dict) -> None:
        self._seconds.append(record["seconds"])
        done = record["step"] + 1
        if self._live:
            self._live.start()
            line = describe(record, self._width)
            self._live.update(self._task, completed=done, description=line, eta=self._eta(done))
        if "validation_bits_per_byte" in record:
            self.say(
                f"step {done}/{self._num_steps}  validation {record['validation_bits_per_byte']:.4f} bits per byte"
            )
        if record["rows_dropped"]:
            self.say(
                f"step {done}/{self._num_steps}  {record['rows_dropped']:,} rows dropped, the expert buffer was full"
            )
        if record["skipped"]:
            self.say(
                f"step {done}/{self._num_steps}  SKIPPED, {record['skipped_so_far']} so far: "
                + "; ".join(record["skip_reasons"])
            )
        if not self._live and (done % self._log_every == 0 or done == self._num_steps):
            self.say(f"step {done}/{self._num_steps}  {describe(record, 1000)}  eta {self._eta(done)}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
