"""Signs of life: what a process tells the supervisor on its host, through a small file that both know.

The supervisor looks at the file and not at the process, so it also finds a process whose Python stands still: stopped by
a signal, or in a C call that holds the interpreter's lock. Times are of the monotonic clock, which a host has only one of.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

PULSE = "K2JAX_PULSE"  # environment variable: the path of the file
_FORM = struct.Struct("<ddq")


@dataclass(frozen=True)
class Signs:
    """The times when a process last went on and until when it must again, and its newest committed step, or -1."""

    since: float
    until: float
    committed: int


QUIET = Signs(math.nan, math.inf, -1)  # of a process that has told nothing yet, and is left in peace


def read_signs(path: Path) -> Signs:
    """The signs given through `path`. The file holds one record, or nothing."""
    content = path.read_bytes()
    return Signs(*_FORM.unpack(content)) if len(content) == _FORM.size else QUIET


class Pulse:
    """The process's end. Without a supervisor nothing is told."""

    def __init__(self):
        path = os.environ.get(PULSE)
        self._file = os.open(path, os.O_WRONLY) if path else None
        self._signs = QUIET

    def _tell(self, signs: Signs) -> None:
        self._signs = signs
        if self._file is not None:
            os.pwrite(self._file, _FORM.pack(signs.since, signs.until, signs.committed), 0)

    def beat(self, since: float, until: float) -> None:
        """This process went on at `since`, and will again before `until`, times of the monotonic clock."""
        self._tell(Signs(since, until, self._signs.committed))

    def committed(self, step: int) -> None:
        """`step` is safe, so that a restart loses nothing before it."""
        self._tell(Signs(self._signs.since, self._signs.until, step))
