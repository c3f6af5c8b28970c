"""Several processes of one command on this machine, supervised: the way to try many hosts on a laptop and in CI.

Each process, a rank, writes into a pipe of its own; a thread reads it by whole lines, another waits for the rank's end,
and both report to one queue that the main thread empties. The ranks share a process group with their guardian and not
with the launcher, so a terminal's Ctrl-C reaches the launcher alone.
"""

import contextlib
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from k2jax.errors import UserError
from k2jax.launch import guardian
from k2jax.launch.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, SIMULATE
from k2jax.launch.pulse import PULSE, read_signs
from k2jax.launch.restarts import Restarts

GRACE = 10.0  # seconds to end by oneself, before SIGTERM and again before SIGKILL
_LAST_LINES = 20
_LONGEST_LINE = 1 << 20  # bytes; a longer one is shown in pieces, so that memory is bounded
_NOISE = re.compile(rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks")  # of C++, one line a communicator
_SIGNALS = {number.value: number.name for number in signal.Signals}
_TICK = 0.1  # seconds between two looks at signals and deadlines


def _say(text: str) -> None:
    print(f"k2jax launch: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port that nobody listens on now, below those that systems give to outgoing connections.

    One of these would be free now, and taken by a connection before a process comes to listen there.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port


def rank_environments(count: int, devices: int | None) -> list[dict[str, str]]:
    """The variables by which `count` processes here find each other, and their number of CPU devices, if given."""
    common = {COORDINATOR: f"127.0.0.1:{free_port()}", NUM_PROCESSES: str(count)}
    if devices is not None:
        common[SIMULATE] = str(devices)
    return [common | {PROCESS_ID: str(index)} for index in range(count)]


@dataclass
class _Rank:
    """A process. code: 128 + n if signal n ended it; ended: when, by the monotonic clock; last: its last lines."""

    index: int
    process: subprocess.Popen
    log: BinaryIO | None
    pulse: Path
    alone: bool
    silent: bool = False  # for longer than it may, so that it was killed
    code: int | None = None
    ended: float = float("inf")
    open: bool = True
    last: deque[bytes] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    def prefixed(self, line: bytes) -> bytes:
        """[2] and the line; the line as it is where no other rank is here."""
        return line if self.alone else b"[%d] %s\n" % (self.index, line.removesuffix(b"\n"))

    def read(self, reports: queue.Queue) -> None:
        """Report every line; None at the end of the output."""
        with self.process.stdout as pipe:
            for line in iter(lambda: pipe.readline(_LONGEST_LINE), b""):
                reports.put((self, line))
        reports.put((self, None))

    def wait(self, reports: queue.Queue) -> None:
        """Report the exit code, and when the process ended: the queue may be read much later."""
        code = self.process.wait()
        reports.put((self, (code if code >= 0 else 128 - code, time.monotonic())))


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP are noted in the list instead of ending this process."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}  # nohup's, a shell's &
    for number in before:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _guarded_group(grace: float) -> Iterator[int]:
    """A process group that ends with this block, or with this process, with all that is left in it."""
    argv = [sys.executable, "-I", "-S", guardian.__file__, str(grace)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, process_group=0)
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def _open_logs(folder: Path | None, count: int) -> list[BinaryIO | None]:
    if folder is None:
        return [None] * count
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            open(folder / f"rank-{index}.log", "ab", buffering=0) for index in range(count)
        ]  # a resumed run goes on in it
    except OSError as error:
        raise UserError(f"--log-dir {folder}: cannot be written ({error.strerror}: {error.filename})") from None


class _Supervisor:
    """The main thread's part: shows lines, and ends all ranks when one has failed or the user asks for it."""

    def __init__(self, ranks: list[_Rank], caught: list[int], grace: float):
        self.ranks, self.caught, self.grace = ranks, caught, grace
        self.stopped_by: int | None = None
        self.hurried = False  # by a second signal
        self.broken: OSError | None = None  # output that could not be written
        self._failing = False
        self._due: list[tuple[float, int]] = []  # signals to send, and when

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.process.send_signal(number)

    def _stop_in(self, *delays: tuple[float, int]) -> None:
        now = time.monotonic()
        self._due = sorted(self._due + [(now + seconds, number) for seconds, number in delays])

    def _show(self, rank: _Rank, line: bytes) -> None:
        """A line to its log and, but for noise, to stdout. If it cannot be written, all ranks are ended."""
        noise = _NOISE.match(line)
        if not noise:
            rank.last.append(line)
        try:
            if rank.log is not None:
                rank.log.write(line)
            if not noise and self.broken is None:
                sys.stdout.buffer.write(rank.prefixed(line))
                sys.stdout.buffer.flush()
        except OSError as error:
            if self.broken is None:
                self.broken = error
                self._stop_in((0, signal.SIGTERM), (self.grace, signal.SIGKILL))

    def _ended(self, rank: _Rank, code: int, when: float) -> None:
        rank.code, rank.ended = code, when
        if rank in self._failed() and not self._failing:  # the others hear of it and end by themselves, in most cases
            self._failing = True
            self._stop_in((self.grace, signal.SIGTERM), (2 * self.grace, signal.SIGKILL))

    def _failed(self) -> list[_Rank]:
        """Ranks with another code than 0; a signal's is no failure once all were sent it."""
        sent = {128 + signal.SIGTERM: self.stopped_by is not None, 128 + signal.SIGINT: self.hurried}
        return [rank for rank in self.ranks if rank.code not in (None, 0) and not sent.get(rank.code)]

    def _take_signals(self) -> None:
        while self.caught:
            number = self.caught.pop(0)
            if self.stopped_by is None:
                self.stopped_by = number
                _say(
                    f"{signal.Signals(number).name}: SIGTERM to all processes; once more ends them without a save"
                )
                self._send(signal.SIGTERM)
            else:
                _say(f"{signal.Signals(number).name} again: SIGINT to all processes, SIGKILL in {self.grace:g} s")
                self.hurried = True
                self._send(signal.SIGINT)
                self._stop_in((self.grace, signal.SIGKILL))
        while self._due and self._due[0][0] <= time.monotonic():
            self._send(self._due.pop(0)[1])

    def _take_report(self, reports: queue.Queue) -> bool:
        """Handle the next report; False if none came within a tick."""
        try:
            rank, report = reports.get(timeout=_TICK)
        except queue.Empty:
            return False
        if report is None:
            rank.open = False
        elif isinstance(report, bytes):
            self._show(rank, report)
        else:
            self._ended(rank, *report)
        return True

    def _look_at_signs(self) -> None:
        """SIGKILL for a rank that is silent for longer than it may: its own watchdog would have spoken if it could."""
        now = time.monotonic()
        for rank in self.ranks:
            if rank.code is None and not rank.silent and now > (signs := read_signs(rank.pulse)).until:
                rank.silent = True
                _say(f"process {rank.index} is stuck, no sign of life for {now - signs.since:.0f} s: SIGKILL")
                rank.process.kill()

    def run(self, reports: queue.Queue) -> None:
        """Handle signals and reports until every rank has ended."""
        while any(rank.code is None for rank in self.ranks):
            self._take_signals()
            self._take_report(reports)
            self._look_at_signs()

    def drain(self, reports: queue.Queue) -> None:
        """Handle reports until all outputs are closed, or silent for long: a daemon in another group may hold one."""
        heard = time.monotonic()
        while any(rank.open for rank in self.ranks) and time.monotonic() - heard < self.grace:
            if self._take_report(reports):
                heard = time.monotonic()

    def verdict(self, began: float) -> int:
        """The exit code of the rank that failed first, whose last lines it repeats; 128 + n if signal n stopped all."""
        if self.broken is not None:
            raise self.broken
        failed = self._failed()
        if not failed:
            return 128 + self.stopped_by if any(rank.code for rank in self.ranks) else 0
        # What the others end with is the loss of the one that was stuck, even where they were the first to end.
        first = min(failed, key=lambda rank: (not rank.silent, rank.ended))
        name = _SIGNALS.get(first.code - 128)
        code = f"{first.code} ({name})" if name else str(first.code)
        if first.alone:
            _say(f"the process of this host ended with exit code {code}")
            return first.code
        say = f"process {first.index} failed first, with exit code {code} after {first.ended - began:.1f} s"
        _say(f"{say}; its last lines:" if first.last else f"{say}, without a word")
        sys.stderr.buffer.write(b"".join(map(first.prefixed, first.last)))
        sys.stderr.buffer.flush()
        return first.code


@dataclass(frozen=True)
class Ended:
    """The end of all ranks. code: that of the command; stopped: by its user; committed: the newest step, or -1."""

    code: int
    stopped: bool
    committed: int


def supervise(
    argv: list[str],
    environments: list[Mapping[str, str]],
    log_dir: Path | None = None,
    grace: float = GRACE,
    is_host: bool = False,
) -> Ended:
    """Run `argv` once per environment, added to this process's own, and show all lines, with "[2] " before them.

    is_host: the one process is this host's part of a run, and its lines are shown as they are.
    Lines of stdout and stderr are shown whole, in the order in which they came; log_dir/rank-I.log gets the bytes of
    rank I as they are. When a rank fails, the others have `grace` seconds to end by themselves, then they get SIGTERM,
    and SIGKILL after `grace` more. SIGINT, SIGTERM or SIGHUP becomes SIGTERM for all, which trainers answer by saving;
    the second one, SIGINT, which ends them at once, and SIGKILL after `grace`. A rank that gives no sign of life for
    longer than it said it would (launch/pulse.py) gets SIGKILL. What is in the ranks' process group outlives neither this
    call nor, by more than `grace`, this process. To be called in the main thread.

    The exit code is 0 if all had that, else of the rank that failed first; 128 + n if signal n stopped all. Raises
    UserError for a log_dir that cannot be written, OSError for output that cannot be, once all ranks have ended.
    """
    logs = _open_logs(log_dir, len(environments))
    reports: queue.Queue = queue.Queue(maxsize=1000)  # a slow terminal slows the ranks down instead of filling memory
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="k2jax-") as folder, _caught_signals() as caught, _guarded_group(grace) as group:
        ranks: list[_Rank] = []
        for index, (environment, log) in enumerate(zip(environments, logs, strict=True)):
            pulse = Path(folder) / f"pulse-{index}"
            pulse.touch()
            process = subprocess.Popen(
                argv,
                env=os.environ | environment | {PULSE: str(pulse)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=group,
            )
            ranks.append(_Rank(index, process, log, pulse, is_host))
        for rank in ranks:
            threading.Thread(target=rank.read, args=(reports,), daemon=True).start()
            threading.Thread(target=rank.wait, args=(reports,), daemon=True).start()
        supervisor = _Supervisor(ranks, caught, grace)
        supervisor.run(reports)
        committed = max(read_signs(rank.pulse).committed for rank in ranks)
    supervisor.drain(reports)  # what they had started is gone too: the pipes are at their end
    for log in logs:
        if log is not None:
            log.close()
    return Ended(supervisor.verdict(began), supervisor.stopped_by is not None, committed)


def run_on_host(argv: list[str]) -> int:
    """`supervise` this host's process of a run that a cluster has started, and will start again; the exit code."""
    return supervise(argv, [{}], is_host=True).code


def run_again(argv: list[str], count: int, devices: int | None, log_dir: Path | None = None, max_restarts: int = 0) -> int:
    """`supervise` a command of k2jax in `count` processes, and again after failures; the exit code.

    devices: of each process, on the CPU. max_restarts: in a row without a newer committed step.
    """
    restarts = Restarts(max_restarts)
    while True:
        ended = supervise(argv, rank_environments(count, devices), log_dir)
        if ended.code == 0 or ended.stopped:
            return ended.code
        again, why = restarts.after(ended.code, ended.committed)
        _say(f"exit code {ended.code}: {why}")
        if not again:
            return ended.code
