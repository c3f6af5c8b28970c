"""Steps done again after a restart: equal bits are said once, other losses each time, and past the bound end the run."""

import math

import pytest

from k2jax.errors import RunFailed
from k2jax.train.replay import Replay


def record(step: int, loss: float) -> dict:
    return {"step": step, "loss_hex": loss.hex()}


DROPPED = [record(8, 2.5), record(9, 2.25), record(10, math.nan)]


def test_equal_bits_are_said_once():
    replay = Replay(DROPPED, 0.0)
    said = [replay.compare(record(step, loss)) for step, loss in ((8, 2.5), (9, 2.25), (10, math.nan), (11, 2.0))]
    assert said[0] == "step 8, done again: the same loss as before, bit for bit" and said[1:] == [None] * 3


@pytest.mark.parametrize("bound", [None, 1e-6])
def test_rounding_is_said_each_time(bound):
    replay = Replay(DROPPED, bound)
    said = [replay.compare(record(8, math.nextafter(2.5, 3))), replay.compare(record(9, 2.25 * (1 + 5e-7)))]
    assert said[0].startswith("step 8, done again: its loss is 2.5000000000000004, before it was 2.5 (2.2e-16 apart)")
    assert "5.0e-07 apart" in said[1]


@pytest.mark.parametrize(("step", "loss"), [(8, 2.6), (8, -2.5), (9, math.nan), (10, 2.0), (9, math.inf)])
def test_past_the_bound_the_run_ends(step, loss):
    assert "apart" in Replay(DROPPED, None).compare(record(step, loss))
    with pytest.raises(RunFailed, match="done again.*train.replay_bound = 0.001; look at the devices"):
        Replay(DROPPED, 1e-3).compare(record(step, loss))
