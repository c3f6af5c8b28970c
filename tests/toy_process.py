"""A process without a model, for tests of k2jax.processes: toy_process.py ADDRESS COUNT INDEX WORK, COUNT 0 for one alone."""

import ctypes
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

from k2jax import processes
from k2jax.config import Config, TrainConfig, WatchdogConfig
from k2jax.errors import RunFailed, UserError
from k2jax.launch import distributed
from k2jax.preflight.ranks import check_storage
from k2jax.train.stop import StopRequest
from k2jax.train.watchdog import Watchdog


def talk() -> None:
    for turn in range(3):  # the names may be used again
        assert processes.gather("letters", chr(97 + processes.index()) * turn) == [chr(97 + i) * turn for i in range(processes.count())]
    assert [len(text) for text in processes.gather("large", "x" * 2_000_000)] == [2_000_000] * 3  # gRPC's own bound: 4 MiB
    assert processes.on_first("first", lambda: {"pid": os.getpid()})["pid"] == processes.gather("pid", os.getpid())[0]
    for kind in (UserError, RunFailed):
        try:
            processes.on_first("wrong", lambda kind=kind: (_ for _ in ()).throw(kind("a, b")))
        except kind as error:
            assert str(error) == "a, b"
        else:
            raise AssertionError(kind)
    processes.leave()
    assert processes.count() == 1 and processes.gather("alone", 3) == [3]


def one_fails() -> None:
    processes.keep_last_words(Path("ranks"))
    processes.barrier("ready")  # all know where their last words go
    if processes.index() == 1:
        processes.fail(UserError("field: 3: must be 4", "other: 5: must be 6"))
    time.sleep(60)


def one_fails_in_a_collective() -> None:
    """The others see a broken connection, no more."""
    if processes.index() == 1:
        raise RunFailed("of process 1")
    time.sleep(0.5)
    raise ConnectionResetError("by peer")


def without_terminal() -> None:
    """Standard error is from now on a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)


def one_fails_without_terminal() -> None:
    if processes.index() == 1:
        without_terminal()
        raise UserError("of process 1")
    time.sleep(60)


def another_is_without_terminal() -> None:
    if processes.index() == 1:
        without_terminal()
        time.sleep(60)
    time.sleep(1)
    raise UserError(f"of process {processes.index()}")


def one_has_a_directory_of_its_own() -> None:
    """As on hosts that share nothing."""
    folder = Path("own" if processes.index() == 1 else "common") / "run"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder.parent)
    check_storage(Path("run"), {}, 1)


def one_sees_an_old_listing() -> None:
    """A file system of several hosts shows process 1 none of the steps that process 0 has committed."""
    from k2jax.runs import commits
    from k2jax.train import start

    checkpoints = Path("run/checkpoints")
    if processes.is_first():
        checkpoints.mkdir(parents=True)
        for step in (4, 8):
            commits.commit(checkpoints, {"step": step, "holds": [], "files": {}, "content": {}, "data_position": {}})
        (checkpoints / "8.json").write_text("{}")
    processes.barrier("saved")
    if not processes.is_first():
        start.committed_steps = commits.committed_steps = lambda folder: []
    step, problems = start.find_step(Config(train=TrainConfig(run_dir="run")))
    assert step == 4 and len(problems) == 2 and Path("run/damaged/8.json").exists(), (step, problems)
    processes.leave()


class Said:
    """The outputs of a run, as far as StopRequest knows them."""

    def say(self, text: str) -> None:
        print(text, flush=True)


def send(number: int, *seconds: float) -> None:
    """Signals to this process, after so many seconds each."""
    for delay in seconds:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()


def stay_out_of_python() -> None:
    """As in a long step: nothing of Python runs in the main thread, no handler of a signal either."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def one_is_told_to_stop() -> None:
    """Steps that all do together, and one of them is told of twice, as schedulers do."""
    stop = StopRequest()
    stop.begin(Said())
    if processes.index() == 1:
        send(signal.SIGTERM, 1, 1.1, 2.5)
    for step in itertools.count(20):
        if stop.is_due(step):
            break
        processes.barrier("step")
        time.sleep(0.05 * (processes.index() + 1))
    time.sleep(2)
    print(f"ended after {step}, {stop.signal}", flush=True)
    stop.restore()
    processes.leave()


def one_is_interrupted_twice() -> None:
    stop = StopRequest()
    stop.begin(Said())
    processes.barrier("ready")
    if processes.index() == min(1, processes.count() - 1):  # the second, if there is one
        send(signal.SIGINT, 1, 1.2, 3.5)
    stay_out_of_python()


def one_is_stopped_before_it_begins() -> None:
    StopRequest()
    processes.barrier("ready")
    if processes.index() == 1:
        send(signal.SIGTERM, 0.5)
    processes.barrier("data")
    stay_out_of_python()


def one_is_late() -> None:
    if processes.index() != 1:
        processes.barrier("here", 2)


def _steps(at_three) -> None:
    """Steps that all do together, under a watchdog, but for what the last process does in the fourth of them."""
    dog = Watchdog(WatchdogConfig(step_seconds=2, phase_seconds=60), Path("ranks"))
    dog.start(lambda: print("stuck", flush=True))
    for step in range(8):
        dog.watch("step")
        processes.barrier("step")
        if step == 3 and processes.index() == processes.count() - 1:
            at_three()
    dog.stop()
    time.sleep(3)
    print("done", flush=True)


def one_sleeps() -> None:
    _steps(lambda: time.sleep(60))


def one_keeps_the_interpreter() -> None:
    _steps(lambda: ctypes.PyDLL(None).sleep(60))


def all_wait() -> None:
    dog = Watchdog(WatchdogConfig(step_seconds=None, phase_seconds=1), Path("ranks"))
    dog.start(lambda: None)
    dog.watch("restore")
    time.sleep(60)


def one_stands_still() -> None:
    """As a laptop that is closed: nothing of the process runs for seconds, and then all of it."""

    def stand_still() -> None:
        print("stop me", flush=True)
        time.sleep(1)

    _steps(stand_still)


if __name__ == "__main__":
    address, count, index, work = sys.argv[1:]
    if count != "0":
        distributed.use_cpu_devices(1)
        options = {"K2JAX_COORDINATOR": address, "K2JAX_NUM_PROCESSES": count, "K2JAX_PROCESS_ID": index}
        distributed.join(options, {}, print)
    try:
        globals()[work]()
    except Exception as error:
        processes.fail(error)
