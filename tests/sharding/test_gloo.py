"""Between CPU processes no program has a reduce-scatter: gloo's is wrong now and then (jax issue 40830)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest
from compile_flags import COMPILE_FLAGS

HERE = Path(__file__).parent
# Versions of jaxlib in which it was seen wrong: 9 of 62 and 2 of 10 self-checks of two processes on a busy machine.
WRONG = ("0.10.2", "0.11.2")


@pytest.mark.grid
def test_the_step_has_no_reduce_scatter_and_sums_are_the_same():
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "train")])
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": COMPILE_FLAGS}
    command = [sys.executable, str(HERE / "gloo_program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and found["numbers"] > 1000
    before, after = found["reduce_scatters"]
    assert before >= 3 and after == 0


def test_upstreams_mend_is_not_here_yet():
    """Of another jaxlib, see whether jax issue 40830 is mended in it; if so, sharding/gloo.py can go, else add it above."""
    assert jaxlib.__version__ in WRONG
