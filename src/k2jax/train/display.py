"""What a person sees while a run goes on: live on a terminal, plain lines elsewhere."""

import contextlib
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


def describe(record: dict, width: int) -> str:
    """One step in one line; fields of fixed width, the last ones left out where `width` columns do not hold them."""
    heads = ", ".join(record["clipped_heads"][:4]) + (", ..." if record["heads_clipped"] > 4 else "")
    loss, logit, grad = (math.nan if record[n] is None else record[n] for n in ("loss", "max_logit", "grad_norm"))
    fields = [
        f"loss {loss:6.4f}",
        f"max logit {logit:6.2f}",
        f"clipped {record['heads_clipped']}" + (f" ({heads})" if heads else ""),
        f"grad {grad:6.3f}",
        f"lr {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:7,.0f} tok/s",
    ]
    fields = [fields[i] for i in (0, 3, 4, 5, 1, 2)] if width >= 110 else fields
    while len(fields) > 1 and len("  ".join(fields)) > width:
        fields.pop()
    return "  ".join(fields)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Display:
    """Prints banner, phases and steps. `log_every`: steps between plain lines; a terminal shows every step."""

    def __init__(self, first_step: int, num_steps: int, log_every: int):
        self._console = Console(soft_wrap=True, highlight=False)
        self._log_every, self._num_steps, self._first_step = log_every, num_steps, first_step
        self._started = None
        self._live = None
        if self._console.is_terminal:
            width = self._console.width
            bar = [BarColumn(12)] if width >= 120 else []
            columns = [MofNCompleteColumn(table_column=Column(no_wrap=True)), *bar, TimeRemainingColumn()]
            self._live = Progress(TextColumn("step"), *columns, TextColumn("{task.description}"), console=self._console)
            self._width = width - (50 if bar else 28)  # what the other columns leave
            self._task = self._live.add_task("", total=num_steps, completed=first_step)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
        sys.stdout.flush()

    @contextlib.contextmanager
    def phase(self, name: str):
        """A named part of the start-up, with its time and what is appended to the list; a spinner on a terminal."""
        started, notes = time.monotonic(), []
        with self._console.status(name) if self._console.is_terminal else contextlib.nullcontext():
            yield notes
        self.say(", ".join([f"{name}: {time.monotonic() - started:.1f} s", *notes]))

    def step(self, record: dict) -> None:
        self._started = self._started or time.monotonic() - record["seconds"]
        done = record["step"] + 1
        if self._live:
            self._live.start()
            self._live.update(self._task, completed=done, description=describe(record, self._width))
        if "validation_bits_per_byte" in record:
            self.say(
                f"step {done}/{self._num_steps}  validation {record['validation_bits_per_byte']:.4f} bits per byte"
            )
        if record["rows_dropped"]:
            self.say(f"step {done}/{self._num_steps}  {record['rows_dropped']:,} rows dropped for want of room")
        if record["skipped"]:
            self.say(
                f"step {done}/{self._num_steps}  SKIPPED, {record['skipped_so_far']} so far: {describe(record, 60)}"
            )
        if not self._live and (done % self._log_every == 0 or done == self._num_steps):
            left = (time.monotonic() - self._started) / (done - self._first_step) * (self._num_steps - done)
            self.say(f"step {done}/{self._num_steps}  {describe(record, 1000)}  eta {_duration(left)}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
