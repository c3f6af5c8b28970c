"""Signs of life, and a supervisor that ends a process without them."""

import math
import os
import sys
import time

from k2jax.launch.local import rank_environments, supervise
from k2jax.launch.pulse import PULSE, QUIET, Pulse, Signs, read_signs

RANK = "import os, sys, time, signal\nfrom k2jax.launch.pulse import Pulse\npulse, now = Pulse(), time.monotonic()\n"


def test_what_is_told_is_read(tmp_path, monkeypatch):
    path = tmp_path / "pulse"
    path.touch()
    monkeypatch.setenv(PULSE, str(path))
    pulse = Pulse()
    assert read_signs(path) == QUIET
    pulse.committed(8)
    assert (read_signs(path).until, read_signs(path).committed) == (math.inf, 8)
    pulse.beat(10.5, 20.25)
    assert read_signs(path) == Signs(10.5, 20.25, 8)
    monkeypatch.delenv(PULSE)
    Pulse().beat(1, 2)  # nobody is there


def ranks(script, count=2):
    return supervise([sys.executable, "-c", RANK + script], rank_environments(count, None), grace=3)


def test_a_rank_that_is_stopped_is_killed_and_named(capfd):
    script = """
pulse.committed(12)
pulse.beat(now, now + 60)
if os.environ["K2JAX_PROCESS_ID"] == "1":
    pulse.beat(now, now + 1)
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(4)
sys.exit(7)
"""
    began = time.monotonic()
    ended = ranks(script)
    assert (ended.code, ended.stopped, ended.committed) == (137, False, 12) and time.monotonic() - began < 10
    told = capfd.readouterr().err
    assert "process 1 is stuck, no sign of life for 1 s: SIGKILL" in told
    assert "process 1 failed first, with exit code 137 (SIGKILL)" in told


def test_a_rank_that_gives_signs_is_left_alone():
    assert ranks("for _ in range(8):\n    pulse.beat(time.monotonic(), time.monotonic() + 1)\n    time.sleep(0.4)\n").code == 0
    assert ranks("time.sleep(2)").code == 0  # and one that has told nothing
    assert "K2JAX_PULSE" not in os.environ
