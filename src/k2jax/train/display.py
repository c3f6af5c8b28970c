"""What a person sees while a run goes on: live on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def describe(record: dict) -> str:
    """One step in one line."""
    heads = ", ".join(record["clipped_heads"][:4]) + (", ..." if record["heads_clipped"] > 4 else "")
    clipped = f"{record['heads_clipped']} ({heads})" if record["heads_clipped"] else "0"
    return (
        f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3g}  lr {record['learning_rate']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tok/s  max logit {record['max_logit']:.2f}  heads clipped {clipped}"
    )


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
            self._live = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("eta"), TimeRemainingColumn(),
                TextColumn("{task.description}"), console=self._console,
            )  # fmt: skip
            self._task = self._live.add_task("", total=num_steps, completed=first_step)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)
        sys.stdout.flush()

    @contextlib.contextmanager
    def phase(self, name: str):
        """A named part of the start-up, with its time; a spinner on a terminal."""
        started = time.monotonic()
        with self._console.status(name) if self._console.is_terminal else contextlib.nullcontext():
            yield
        self.say(f"{name}: {time.monotonic() - started:.1f} s")

    def step(self, record: dict) -> None:
        self._started = self._started or time.monotonic() - record["seconds"]
        done = record["step"] + 1
        if self._live:
            self._live.start()
            self._live.update(self._task, completed=done, description=describe(record))
        elif done % self._log_every == 0 or done == self._num_steps:
            left = (time.monotonic() - self._started) / (done - self._first_step) * (self._num_steps - done)
            self.say(f"step {done}/{self._num_steps}  {describe(record)}  eta {_duration(left)}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
