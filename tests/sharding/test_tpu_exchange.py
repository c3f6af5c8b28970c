"""The MoE layer of Kimi K2, compiled for TPU v5p by libtpu on a machine without one: `make test-tpu`."""

import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from k2jax.config import KernelsConfig, MeshConfig, ModelConfig
from k2jax.model.moe import MoE
from k2jax.model.weights import Param, RouterBias, Stack
from k2jax.plan.topology import topology_devices
from k2jax.sharding.names import AXES
from k2jax.sharding.place import place
from k2jax.sharding.rules import spec

pytestmark = pytest.mark.tpu

HBM_GIB = 95


def lower_layer(mesh, kernels, sequences_per_chip, length):
    """Forward and backward of one layer: router, exchange, 384 experts, shared expert; bfloat16, float32 weights."""
    graph, *values = nnx.split(MoE(Stack(ModelConfig(), 1, 1, kernels)), Param, RouterBias)

    def abstract(variable):
        cut = tuple(variable.weight.spec(mesh.shape))[1:]  # of one layer: without the leading dim of the stack
        return jax.ShapeDtypeStruct(variable.weight.shape[1:], jnp.float32, sharding=jax.NamedSharding(mesh, P(*cut)))

    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    params, bias = (nnx.to_pure_dict(jax.tree.map(abstract, v, is_leaf=is_variable)) for v in values)
    shape = sequences_per_chip * mesh.size, length, ModelConfig().hidden_size
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec("BTD")))

    def loss(params, x, bias):
        y, report = nnx.merge(graph, params, bias)(place(x, "BTD"))
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + report.balance_loss.sum(), report.rows_dropped

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(params, x, bias)


@pytest.mark.parametrize(
    ("axes", "kernels", "length", "collectives"),
    [
        # rows out and back, forward and backward
        ({"expert": 64}, {"expert_buffer": 1.25}, 4096, {"ragged_all_to_all": 4}),
        ({"expert": 64}, {}, 2048, {"ragged_all_to_all": 4}),
        # tokens and weights gathered, outputs summed and cut; forward and backward are each other's
        ({"fsdp": 8, "expert": 8}, {"expert_buffer": 1.25}, 4096, {"ragged_all_to_all": 0, "reduce_scatter": 3}),
    ],
    ids=["ragged-bounded", "ragged-dropless", "auto-is-ring"],
)
def test_k2_layer_on_v5p(axes, kernels, length, collectives, capsys):
    """On 64 chips, a sequence of this length a chip: it compiles, fits, and rows travel by their own collective."""
    devices = topology_devices("v5p:4x4x4")
    shape = tuple(getattr(MeshConfig(**axes), axis) for axis in AXES)
    assert math.prod(shape) == len(devices)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    started = time.monotonic()
    lowered = lower_layer(mesh, KernelsConfig(**kernels), 1, length)
    # of what goes into XLA: this libtpu's answer to as_text() is not always readable by an older jaxlib
    text = lowered.as_text()
    kinds = "ragged_all_to_all", "all_to_all", "all_gather", "reduce_scatter"
    found = {kind: len(re.findall(rf"[^\w]{kind}\W", text)) for kind in kinds}
    memory = lowered.compile().memory_analysis()
    arguments, temp = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    with capsys.disabled():
        print(f"\n{axes} {kernels}, {length} tokens: compiled in {time.monotonic() - started:.0f} s; bytes per chip: "
              f"arguments {arguments:.2f} GiB, temp {temp:.2f} GiB; {found}")  # fmt: skip
    for kind, count in collectives.items():
        assert found[kind] == count
    assert arguments + temp < HBM_GIB
