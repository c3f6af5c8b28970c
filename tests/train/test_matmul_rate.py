"""The matmul rate that a step is held against: what is measured, what it costs, and the share in the records."""

import time

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from k2jax.model.flops import flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.sharding.mesh import mesh_of
from k2jax.train import matmul_rate as module
from k2jax.train.matmul_rate import matmul_rate, matmul_seconds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measure_is_short_and_near_what_numpy_takes(dtype):
    """All eight devices of this process share its cores, so that their sum is the machine's rate, as NumPy's is."""
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, tensor=2)):  # as in a run, whose mesh is not the measure's
        started = time.monotonic()
        rate = matmul_rate(dtype)
        assert time.monotonic() - started < 2.5  # 0.3 s on idle cores
        assert jnp.zeros(8).sharding.mesh.size == 8
    x, seconds = np.ones((1024, 1024), np.float32), []
    for _ in range(5):
        started = time.monotonic()
        x @ x
        seconds.append(time.monotonic() - started)
    if dtype == "float32":
        assert 1 / 6 < rate * jax.local_device_count() / (2 * 1024**3 / min(seconds)) < 6


def test_the_seconds_of_a_step(monkeypatch):
    """At 1 GFLOP/s a device, two devices take half of a step's GFLOPs in seconds."""
    monkeypatch.setattr(module, "matmul_rate", lambda dtype: {"float32": 1e9}[dtype])
    config = micro.config().replace({"train.compute_dtype": "float32"})
    per_token = flops_per_token(weight_leaves(declarations(config.model)), config.model, config.data.sequence_length)
    assert matmul_seconds(config, 2) == pytest.approx(per_token * config.batch_tokens / 2e9)


def test_what_is_compiled_does_the_flops_that_are_counted(monkeypatch):
    """By XLA's own count, per device: one matmul of the width, or a chain whose links are not merged."""
    counts, compile_ = [], jax.stages.Lowered.compile

    def counted(self, *args, **options):
        compiled = compile_(self, *args, **options)
        counts.append(compiled.cost_analysis()["flops"])
        return compiled

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    for width, chain in ((64, 1), (64, 5)):
        monkeypatch.setattr(module, "_shape", lambda platform, shape=(width, chain): shape)
        matmul_rate("float32")
        assert counts.pop() == pytest.approx(2 * width**3 * chain, rel=0.01)
