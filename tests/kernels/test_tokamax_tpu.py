"""tokamax's TPU kernels at Kimi K2's size, compiled for v5p by libtpu on a machine without one: `make test-kernels`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from k2jax.config import KernelsConfig, MeshConfig
from k2jax.kernels.chunked_attention import TokenIndex
from k2jax.kernels.grouped_matmul import grouped_matmul
from k2jax.kernels.tokamax import load_tokamax
from k2jax.model.attention import attention
from k2jax.model.mla import keys_and_values
from k2jax.plan.topology import topology_devices
from k2jax.sharding.names import AXES
from k2jax.sharding.rules import spec

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore")]
KERNEL_CALLS = "tpu_custom_call"


def make_v5p_mesh(**axes) -> jax.sharding.Mesh:
    sizes = [getattr(MeshConfig(**axes), axis) for axis in AXES]
    devices = np.array(topology_devices("v5p:4x4x4")).reshape(sizes)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compile_gradient(function, mesh, dims, shapes, dtypes) -> str:
    """The program that XLA is given, once it has compiled."""
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec(d)))
        for d, shape, dtype in zip(dims, shapes, dtypes, strict=True)
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(function, (0, 1, 2, 3), has_aux=True)).lower(*arguments)
        lowered.compile()
    return lowered.as_text()


def test_attention_compiles():
    """64 heads of 192 / 128 over tensor 4, a sequence of 4,096 tokens to each of fsdp 16: one call each way."""
    load_tokamax("attention")
    mesh, tokens = make_v5p_mesh(fsdp=16, tensor=4), (16, 4096)

    def loss(q, latent, rope, weights, q_index, k_index):
        at = (TokenIndex(index, jnp.zeros_like(index)) for index in (q_index, k_index))
        key, value = jnp.split(weights, 2, -1)
        kernels = KernelsConfig(attention="tokamax")
        out, largest = attention(q, (latent, rope), (key, value), keys_and_values, *at, 0.07, kernels)
        return jnp.sum(out.astype(jnp.float32) ** 2), largest

    shapes = (16, 64, 4096, 192), (*tokens, 512), (*tokens, 64), (512, 64, 256), tokens, tokens
    dtypes = [jnp.bfloat16] * 4 + [jnp.int32] * 2
    text = compile_gradient(loss, mesh, ("BHSK", "BT", "BT", "CHN", "BS", "BZ"), shapes, dtypes)
    assert text.count(KERNEL_CALLS) == 2


def test_grouped_matmul_compiles(use_v5p_ragged_dot):
    """Rows of 16,384 choices through 6 experts of 7168 x 2048, gate and up at once."""
    use_v5p_ragged_dot()

    def loss(x, gate, up, scale, sizes):
        y = jax.shard_map(
            lambda x, gate, up, sizes: grouped_matmul(x, (gate, up), sizes, "tokamax"),
            in_specs=(spec("B"), spec("E"), spec("E"), spec("E")), out_specs=spec("B"),
        )(x, gate, up, sizes)  # fmt: skip
        return jnp.sum(scale * y.astype(jnp.float32) ** 2), None

    shapes = (64 * 16_384, 7168), (384, 7168, 2048), (384, 7168, 2048), (), (384,)
    dtypes = [jnp.bfloat16] * 3 + [jnp.float32, jnp.int32]
    text = compile_gradient(loss, make_v5p_mesh(expert=64), ("B", "E", "E", "", "E"), shapes, dtypes)
    assert text.count(KERNEL_CALLS) == 3
