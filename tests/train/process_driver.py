"""One process of a run, for tests: process_driver.py EVENT ARGUMENTS... runs the `k2jax` command.

EVENT is `none`, or KIND:PROCESS:STEP, which happens in that process when it hands out the record of that step:
term (SIGTERM), kill (SIGKILL), raise (an exception), full (a disk error), stop (SIGSTOP), bad (RunFailed), sleep (the main
thread, for good), small (files of at most 4 kB from here on), slow (0.3 s), hold (the same in a C call that keeps the interpreter's lock), or in all processes, PROCESS -1, alike.
With K2JAX_EVENT_ONCE set to a path it happens once for all starts, of which the first that comes there makes the file. With `bad` every save takes three seconds more;
or KIND:PROCESS:every, in each step; or KIND:PROCESS:save, eval, restore, compile: at the beginning of the first of these after step 0.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
import time

import jax
from jax._src import cache_key

from k2jax import processes
from k2jax.cli.main import main
from k2jax.errors import RunFailed
from k2jax.train import checkpoint, compile_cache, compile_step, loop, start
from k2jax.train.recorder import Recorder


def share_compiled_programs() -> None:
    """One process compiles for all, through jax's cache, whose key on a CPU would differ from process to process."""
    cache_key._hash_accelerator_config = lambda hash_obj, devices: cache_key._hash_devices(hash_obj, devices)
    jax.config.update("jax_share_binary_between_hosts", True)
    jax.config.update("jax_share_binary_between_hosts_timeout_ms", 300_000)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def happen(kind: str, process: int) -> None:
    if process not in (processes.index(), -1):
        return
    if once := os.environ.get("K2JAX_EVENT_ONCE"):
        try:
            open(once, "x").close()
        except FileExistsError:
            return
    print(f"event {kind}", flush=True)
    if kind == "raise":
        raise ZeroDivisionError("as the test wants it")
    if kind == "bad":
        raise RunFailed("too many bad rows")
    if kind == "full":
        raise OSError(28, "No space left on device", "metrics.jsonl")
    if kind == "small":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return
    if kind == "slow":
        time.sleep(0.3)
        return
    if kind == "sleep":
        time.sleep(1000)
    if kind == "hold":
        ctypes.PyDLL(None).sleep(1000)
    os.kill(os.getpid(), {"term": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def before(owner, name: str, action) -> None:
    whole = getattr(owner, name)

    def wrapped(*args, **options):
        action(*args)
        return whole(*args, **options)

    setattr(owner, name, wrapped)


def at(moment: str, kind: str, process: int) -> None:
    """Let the event happen once, when the moment has come."""
    done = threading.Event()

    def once(*args) -> None:
        if not done.is_set():
            done.set()
            happen(kind, process)

    if moment == "save":
        before(checkpoint.Saver, "save", lambda self, step, *_: step and once())
    elif moment == "commit":
        before(checkpoint, "file_digests", lambda folder, step, *_: step and once())
    elif moment == "eval":
        before(loop, "bits_per_byte", once)  # its arguments hold a validation that has run
    elif moment == "restore":
        before(start, "restore_state", once)
    elif moment == "every":  # step, and each time
        before(Recorder, "hold", lambda *_: happen(kind, process))
    elif moment == "compile":
        before(compile_cache, "_use", lambda folder: folder and once())
        before(compile_step, "cache_notes", once)
    else:
        before(Recorder, "hold", lambda self, step, *_: step == int(moment) and once())


if __name__ == "__main__":
    share_compiled_programs()
    if sys.argv[1] != "none":
        kind, process, moment = sys.argv[1].split(":")
        if kind == "bad":
            before(checkpoint, "file_digests", lambda folder, step, *_: step and time.sleep(3))
        at(moment, kind, int(process))
    sys.argv[1:] = sys.argv[2:]
    sys.exit(main())
