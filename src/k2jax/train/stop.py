"""The end of a run by a signal: after the step that is under way, and saved. A second Ctrl-C ends it at once.

Python runs a signal's handler where the main thread comes back to Python: after a step, or a compile, of minutes. So a
thread hears of it instead, through the pipe into which Python writes a signal's number as soon as it comes.
"""

import contextlib
import os
import signal
import threading
import time

from k2jax.errors import Stopped
from k2jax.processes import ask_to_stop, fail, is_first, is_joined, stop_is_due, watch_for_stop
from k2jax.train.outputs import Outputs

_FORWARDED = 1.0  # seconds in which a second SIGINT is the first again: of a terminal, and passed on by what started us


class StopRequest:
    """Set by the first SIGINT or SIGTERM, which lets the step end; to be made in the main thread, and restored there.

    A later SIGINT ends the process at once, without a save; SIGTERM again changes nothing, since schedulers repeat it.
    Of several processes one such signal stops all, after the same step. Until `begin` nothing can be saved, and the
    first signal ends all at once.
    signal: that which stops the run, in all processes alike: SIGTERM where there are others.
    """

    def __init__(self):
        self.signal: int | None = None
        self._heard, self._since, self._next = None, 0.0, None
        self._outputs: Outputs | None = None
        self._lock = threading.RLock()  # a handler may interrupt the other one
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_pipe = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        if is_joined():
            watch_for_stop(self._announce)

    def begin(self, outputs: Outputs) -> None:
        """From here on a signal lets the run be saved. outputs: of the run, where it is said."""
        self._outputs = outputs

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                self._take(number[0])

    def _handle(self, number: int, frame) -> None:
        if self._heard is None:  # uvloop, where Orbax starts a save, has a pipe of its own for a moment
            self._take(number)

    def _take(self, number: int) -> None:
        """The first signal asks for the end of the run, a second SIGINT ends this process; any other is no news."""
        with self._lock:
            now, first = time.monotonic(), self._heard is None
            if self._outputs is None or (number == signal.SIGINT and not first and now > self._since + _FORWARDED):
                when = "before the run had begun" if first else "again: ended at once, without a save"
                self._end(number, f"{signal.Signals(number).name} {when}")
            if not first:
                return
            self._heard, self._since = number, now
        if is_joined():
            ask_to_stop()  # all hear of it, and of the step, in `_announce`
        else:
            self._announce(0 if self._next is None else self._next)

    def _end(self, number: int, why: str) -> None:
        if self._outputs is not None:
            with contextlib.suppress(Exception):
                self._outputs.display.close()  # gives the terminal its cursor back
        fail(Stopped(why, number))

    def _announce(self, step: int) -> None:
        """Say that no more than `step` steps will be done; 0 if none has begun."""
        if self._outputs is not None and (is_first() or self._heard == signal.SIGINT):
            what = f"after step {step}" if step else "before the first step"
            self._outputs.say(f"stopping {what}, then saving; a second Ctrl-C ends at once, without a save")

    def is_due(self, step: int) -> bool:
        """True if no step may follow, in all processes alike. To be asked once before every step, after `step` others."""
        self._next = step + 1
        if is_joined():
            if stop_is_due(step):
                self.signal = signal.SIGTERM
        else:
            self.signal = self._heard
        return self.signal is not None

    def restore(self) -> None:
        """Leave signals to what had them before."""
        signal.set_wakeup_fd(self._old_pipe)
        os.close(self._writer)  # which ends the thread
        for number, handler in self._old.items():
            signal.signal(number, handler)
