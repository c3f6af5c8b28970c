"""The watchdog: a thread that ends the run when the main thread gives no sign of life, and says who is stuck where.

The main thread is silent in two cases: it is stuck itself, or it waits for a process that is. All go through the same
changes of what their time is spent on, so the process that has come less far than the others is the one to look at.
"""

import faulthandler
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import k2jax
from k2jax.config import WatchdogConfig
from k2jax.errors import Stuck
from k2jax.launch.pulse import Pulse
from k2jax.processes import answer, ask, count, fail, index, is_joined
from k2jax.words import listed

_STEP_KINDS = "step", "data wait"  # of time
_ANSWER_SECONDS = 5.0
_STANDSTILL = 5.0  # seconds that this thread may be late
_MARGIN = 1.5, 5.0  # times a deadline, and seconds: how much later than this thread the supervisor acts
_HERE = Path(k2jax.__file__).parent


def place_of(thread: int) -> str:
    """The place in k2jax of a thread: "train/recorder.py:57 in write"; of its innermost frame, if none is of k2jax."""
    frame = first = sys._current_frames()[thread]
    while frame is not None and _HERE not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    code = (frame or first).f_code
    path = Path(code.co_filename)
    name = path.relative_to(_HERE) if frame is not None else path.name
    return f"{name}:{(frame or first).f_lineno} in {code.co_name}"


def _named(numbers: list[int]) -> str:
    return f"process {numbers[0]} is" if len(numbers) == 1 else f"processes {listed(numbers)} are"


def verdict(reports: dict[int, dict], processes: int) -> str:
    """Names those that are stuck, by what the processes said: {process: {"changes", "kind", "seconds", "place"}}."""
    silent = [number for number in range(processes) if number not in reports]
    if silent:
        return f"{_named(silent)} stuck: no answer, as of a host or a Python that stands still"
    least = min(report["changes"] for report in reports.values())
    last = [number for number, report in sorted(reports.items()) if report["changes"] == least]
    told = [f"process {n}: {reports[n]['kind']} for {reports[n]['seconds']:.0f} s, {reports[n]['place']}" for n in last]
    if len(last) == processes > 1:
        return f"no process goes on, all have come equally far: {'; '.join(told)}"
    if processes == 1:
        return f"stuck: {told[0].partition(': ')[2]}"
    return f"{_named(last)} stuck, the others wait: {'; '.join(told)}"


class Watchdog:
    """Ends this process by `Stuck`, and with it all others, when the main thread's kind of work outlasts its deadline.

    folder: where the stacks of all threads are then written, as PROCESS.stacks. To be made, started and stopped in the
    main thread.
    """

    def __init__(self, config: WatchdogConfig, folder: Path):
        self._config, self._folder = config, folder
        self._main, self._pulse, self._ended = threading.get_ident(), Pulse(), threading.Event()
        self._state = 0, "start", time.monotonic()  # changes so far, the kind of work, since when

    def start(self, on_stuck: Callable[[], None]) -> None:
        """on_stuck: called before the end."""
        if is_joined():
            answer("stuck", self._report)
        threading.Thread(target=self._run, args=(on_stuck,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """From here on nothing is expected, of this process or by its supervisor."""
        self._ended.set()
        self._pulse.beat(time.monotonic(), math.inf)

    def seconds(self, kind: str) -> float:
        """The deadline of a kind of work."""
        return (self._config.step_seconds if kind in _STEP_KINDS else self._config.phase_seconds) or math.inf

    def watch(self, kind: str) -> None:
        """The main thread goes on, with work of this kind."""
        now, seconds = time.monotonic(), self.seconds(kind)
        self._state = self._state[0] + 1, kind, now
        self._pulse.beat(now, now + _MARGIN[0] * seconds + _MARGIN[1])

    def committed(self, step: int) -> None:
        """`step` is saved; in any thread."""
        self._pulse.committed(step)

    def _report(self) -> dict:
        """This process's answer, its stacks being in their file."""
        changes, kind, since = self._state
        self._folder.mkdir(exist_ok=True)
        with open(self._folder / f"{index()}.stacks", "w", encoding="utf-8") as file:
            file.write(f"{kind} for {time.monotonic() - since:.1f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return {"changes": changes, "kind": kind, "seconds": time.monotonic() - since, "place": place_of(self._main)}

    def _run(self, on_stuck: Callable[[], None]) -> None:
        tick = min(1.0, *(self.seconds(kind) / 10 for kind in ("step", "start")))
        woken = looked = time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            if now - looked > tick + _STANDSTILL:  # of the whole process, by Ctrl-Z or a laptop's lid
                woken = now
            looked, (_, kind, since) = now, self._state
            if now - max(since, woken) > self.seconds(kind):
                self._end(kind, on_stuck)
                return

    def _end(self, kind: str, on_stuck: Callable[[], None]) -> None:
        reports = ask("stuck", _ANSWER_SECONDS) if is_joined() else {index(): self._report()}
        if self._ended.is_set():  # it went on at the last moment, and came to its end
            return
        field = "step_seconds" if kind in _STEP_KINDS else "phase_seconds"
        rule = f"watchdog.{field} = {self.seconds(kind):g} allows no more"
        on_stuck()
        fail(Stuck(f"{verdict(reports, count())}; {rule}; stacks of all threads: {self._folder}/*.stacks"))
