"""The process that holds up the others: what each spends of a step on its own host, compared every few steps.

All wait for one another in every step, so each process's step takes as long as the slowest one's. What differs is the time
from the end of a step on the devices until the next one is handed to them: batches, records, a busy or failing host.
"""

import statistics
import time
from collections.abc import Callable

from k2jax.processes import count, is_first, publish, published

EVERY = 10  # steps between two comparisons
_SHARE = 0.2  # of a step, that one may take longer than most
_LEAST = 0.02  # seconds; less is noise


def slowest(own: dict[int, float], step: float) -> str | None:
    """A sentence about the process that holds up the others. own: seconds of a step on its host, by process; step: of a step."""
    usual = statistics.median_low(own.values())
    process = max(own, key=own.get)
    if own[process] - usual < max(_SHARE * step, _LEAST):
        return None
    return f"process {process} holds up the others: {own[process]:.2f} s of a step of {step:.2f} s on its host, most have {usual:.2f} s"


class Pace:
    """The clock of one process's own part of a step. say: of the first process, where it names the slowest."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._own, self._steps = say, 0.0, 0
        self._free: float | None = None  # before the first step

    def free(self) -> None:
        """The devices have ended a step; from here on they may wait for this process."""
        self._free = time.monotonic()

    def busy(self) -> None:
        """The devices have their next step."""
        now = time.monotonic()
        if self._free is None:
            self._began = now
            return
        self._own += now - self._free
        self._steps += 1
        if self._steps == EVERY:
            self._compare((now - self._began) / EVERY)
            self._own, self._steps, self._began = 0.0, 0, now

    def _compare(self, step: float) -> None:
        if count() == 1:
            return
        publish("pace", self._own / EVERY)
        if is_first() and len(own := published("pace")) == count() and (text := slowest(own, step)):
            self._say(text)
