"""When a run that failed is started again: a policy of numbers, which knows neither processes nor files.

Exit codes of k2jax: 0 all is done; 2 something that its user can correct; 1 the run failed; 124 a process was stuck;
128 + n signal n ended it: 143 (SIGTERM) and 130 (Ctrl-C) because somebody wanted that, 137 (SIGKILL) and others by
accident.
"""

import signal

from k2jax.words import counted

ENDS = {
    2: "there is something to correct, named above",
    128 + signal.SIGINT: "stopped by SIGINT",
    128 + signal.SIGTERM: "stopped by SIGTERM",
}


class Restarts:
    """The budget of restarts: `most` of them without progress, which is a newer committed step; then it is full again."""

    def __init__(self, most: int):
        self._most, self._used, self._committed = most, 0, -1

    def after(self, code: int, committed: int) -> tuple[bool, str]:
        """(whether to start again, why) after exit code `code`, not 0; `committed` is the newest step, -1 for none."""
        if code in ENDS:
            return False, ENDS[code]
        if committed > self._committed:
            self._used, self._committed = 0, committed
        there = "no step is committed" if committed < 0 else f"step {committed} is committed"
        if self._used >= self._most:
            tries = f"after {counted(self._used, 'restart')} in a row without a newer one" if self._used else "--max-restarts is 0"
            return False, f"{there}, {tries}"
        self._used += 1
        return True, f"{there}; restart {self._used} of {self._most} without a newer one"
