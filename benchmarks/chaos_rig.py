"""Runs of the smallest config under their supervisor, with a fault in them, and what must hold at their end."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP / "tests"), str(TOP / "tests" / "train")]

import many  # noqa: E402
import micro  # noqa: E402

from k2jax.runs.commits import committed_steps, read_record  # noqa: E402
from k2jax.runs.records import read_records  # noqa: E402
from k2jax.train.metrics import WALL_CLOCK  # noqa: E402

STEPS, SAVE_EVERY, DEADLINE = 20, 4, 8
OPTIONS = (
    "--mesh.fsdp", "2", "--optim.ns-dtype", "float32", "--train.self-check", "off", "--train.eval-every", "none",
    "--train.compile-cache", "../compiled", "--watchdog.step-seconds", str(DEADLINE), "--watchdog.phase-seconds", "90",
)  # fmt: skip
_LIMIT = 240  # seconds of a whole scenario, after which it hangs


@dataclass(frozen=True)
class Outcome:
    """The end that a fault led to. verdict: PASS, LOUD, FAIL or SILENT; seconds: from the fault until it was noticed."""

    verdict: str
    what: str
    seconds: float | None = None
    lost: int | None = None


@dataclass
class Told:
    """The output of a supervised run, by whole lines with the seconds since its start, and its exit code."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    code: int | None = None

    def at(self, pattern: str, after: float = -1.0) -> float | None:
        """The time of the first line with `pattern`, after so many seconds; None if there is none."""
        return next((seconds for seconds, line in self.lines if seconds > after and re.search(pattern, line)), None)

    def all(self, pattern: str) -> list[str]:
        """The first group of every match."""
        return [found[1] for _, line in self.lines if (found := re.search(pattern, line))]

    def last(self) -> str:
        return self.lines[-1][1] if self.lines else "nothing said"


class Rig:
    """A folder with a token store and an undisturbed run of two processes, with which all others are compared."""

    def __init__(self, folder: Path):
        self.folder = folder
        micro.make_store(folder)
        self.reference = self.run("reference")
        if self.reference.code != 0:
            raise RuntimeError("\n".join(line for _, line in self.reference.lines[-20:]))

    def command(self, name: str, event: str, options: tuple[str, ...], count: int, restarts: int) -> list[str]:
        given = (*OPTIONS, *options)
        values = dict(zip(given[::2], given[1::2], strict=True)) | {"--train.run-dir": name}
        launch = [sys.executable, str(TOP / "benchmarks" / "chaos_launch.py"), event, str(count), str(restarts)]
        return [*launch, *(text for pair in values.items() for text in pair)]

    @contextlib.contextmanager
    def started(self, name: str, event: str = "none", *options: str, count: int = 2, restarts: int = 3, once: bool = True):
        """(the launcher, what it tells) while it runs; killed at the end of the block if it still does."""
        environment = many.ENVIRONMENT | ({"K2JAX_EVENT_ONCE": str(self.folder / f"{name}.once")} if once else {})
        told, began = Told(), time.monotonic()
        process = subprocess.Popen(self.command(name, event, options, count, restarts), cwd=self.folder, env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip

        def read() -> None:
            for line in process.stdout:
                told.lines.append((time.monotonic() - began, line.rstrip("\n")))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield process, told
            process.wait(_LIMIT)
            reader.join(10)
        except subprocess.TimeoutExpired:
            told.lines.append((time.monotonic() - began, f"hangs after {_LIMIT} s"))
        finally:
            process.kill()  # its guardian ends the rest
            process.wait()
            told.code = process.returncode

    def run(self, name: str, event: str = "none", *options: str, **launch) -> Told:
        with self.started(name, event, *options, **launch) as (_, told):
            pass
        return told

    def copy(self, name: str) -> Path:
        """The finished reference run, to be damaged."""
        shutil.copytree(self.folder / "reference", self.folder / name)
        return self.folder / name

    def problems(self, name: str, exact: bool = True) -> list[str]:
        """Invariants I1, I2, I3 and I7 that the run breaks: losses, rows, committed steps, the state at the end."""
        run, reference, clock = self.folder / name, self.folder / "reference", {*WALL_CLOCK}
        mine, theirs = ([{k: v for k, v in r.items() if k not in clock} for r in read_records(f / "metrics.jsonl")] for f in (run, reference))
        problems = []
        if [r["step"] for r in mine] != [*range(STEPS)]:
            problems.append(f"steps {[r['step'] for r in mine]}")
        elif exact and mine != theirs:
            problems.append(f"records differ from step {next(i for i in range(STEPS) if mine[i] != theirs[i])} on")
        elif max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine, theirs, strict=True)) > 1e-6:
            problems.append("losses differ by more than 1e-6")
        if committed_steps(run / "checkpoints")[-1:] != [STEPS]:
            return [*problems, f"the last step is not committed: {committed_steps(run / 'checkpoints')}"]
        if exact and read_record(run / "checkpoints", STEPS)["content"] != read_record(reference / "checkpoints", STEPS)["content"]:
            problems.append("the state at the end is another")
        return problems

    def judge(self, name: str, told: Told, step: int | None = None, noticed: str = "failed first|is stuck", exact: bool = True) -> Outcome:
        """Of a fault at `step` that the supervisor has to overcome by itself."""
        if told.code != 0:
            return Outcome("FAIL", f"exit code {told.code}: {told.last()[:150]}")
        if problems := self.problems(name, exact):
            return Outcome("SILENT", "; ".join(problems))
        fault, seen = told.at(r"event "), told.at(noticed)
        restored = [int(text) for text in told.all(r"restore step (\d+)")]
        lost = None if step is None else max(step - (restored[-1] if restored else 0), 0)
        if lost is not None and lost > SAVE_EVERY + 2:  # the interval, and what is in flight
            return Outcome("FAIL", f"{lost} steps lost", lost=lost)
        how = f"resumed from step {restored[-1]}" if restored else "begun again, nothing was saved yet"
        return Outcome("PASS", how, None if fault is None or seen is None else seen - fault, lost)


def refused(told: Told, rule: str) -> Outcome:
    """Of a start that has to end with a clear error, exit code 2 or 1, and nothing done."""
    when = told.at(rule)
    if told.code in (1, 2) and when is not None:
        return Outcome("LOUD", next(line for _, line in told.lines if re.search(rule, line)).strip()[:150], when)
    return Outcome("FAIL", f"exit code {told.code}: {told.last()[:150]}")


def wait_for(told: Told, pattern: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while told.at(pattern) is None:
        if time.monotonic() > until:
            raise TimeoutError(pattern)
        time.sleep(0.05)


def trainers(launcher: int) -> list[int]:
    """The pids of the processes that train, below a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"process_driver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def send(pid: int, number: int = signal.SIGTERM) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


Scenario = Callable[[Rig], Outcome]
