"""The step's program does not grow with depth, and says which phase is which.

How long it takes to compile: benchmarks/compile_time.py.
"""

import dataclasses
import functools
import re

import jax

from k2jax.config import Config, DataConfig, TrainConfig
from k2jax.sharding.mesh import single_device_mesh
from k2jax.train.compile_step import lower_step


@functools.cache
def lowered(model, num_layers: int) -> jax.stages.Lowered:
    """The whole step, as XLA is given it."""
    config = Config(
        model=dataclasses.replace(model, num_hidden_layers=num_layers),
        data=DataConfig(sequence_length=16, batch_sequences=4),
        train=TrainConfig(num_microbatches=2),
    )
    return lower_step(config, single_device_mesh())[0]


def operations(model, num_layers: int) -> list[str]:
    """Their names, without shapes, in order."""
    text = lowered(model, num_layers).as_text()
    return re.findall(r'= "?(stablehlo\.\w+|call @\w+?)(?:_\d+)?\b', text)


def test_as_many_operations_for_61_layers_as_for_6(tiny):
    """The very same ones, in the same order: every loop over layers is a loop in the program too."""
    deep, shallow = operations(tiny, 61), operations(tiny, 6)
    assert len(shallow) > 1000 and deep == shallow


def test_phases_are_named(tiny):
    """So that a profile reads like the code."""
    text = lowered(tiny, 6).as_text(debug_info=True)
    for scope in ("embed", "layers", "attention", "ffn", "experts", "head", "optimizer"):
        assert re.search(rf'"[^"]*\b{scope}\b[^"]*"', text), scope
