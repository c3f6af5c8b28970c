"""The grouped matmul compiled for H100: ours is not dense, `lax.ragged_dot` is. `make test-gpu`."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.config import KernelsConfig, MeshConfig
from k2jax.kernels.grouped_matmul import choose_grouped_matmul, grouped_matmul
from k2jax.plan.topology import topology_mesh
from k2jax.sharding.compile_options import compile_options, options_without_device

pytestmark = pytest.mark.gpu

NUM_ROWS, NUM_GROUPS, WIDTH = 8192, 6, 512
ROWS_BYTES = 2 * NUM_ROWS * WIDTH


def compile_gradient(implementation: str) -> jax.stages.Compiled:
    mesh = topology_mesh(MeshConfig(), "h100:1x1")

    def loss(x, w, sizes):
        local = jax.shard_map(
            lambda x, w, sizes: grouped_matmul(x, (w,), sizes, implementation),
            in_specs=(jax.P(),) * 3, out_specs=jax.P(), check_vma=False,
        )  # fmt: skip
        return jnp.sum(jnp.sin(local(x, w, sizes).astype(jnp.float32)))

    shapes = ((NUM_ROWS, WIDTH), jnp.bfloat16), ((NUM_GROUPS, WIDTH, WIDTH), jnp.bfloat16), ((NUM_GROUPS,), jnp.int32)
    whole = jax.NamedSharding(mesh, jax.P())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    options = compile_options("gpu") | options_without_device(mesh)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile(compiler_options=options)


def is_dense(compiled: jax.stages.Compiled) -> bool:
    """True if all rows are there once for each group."""
    return f"[{NUM_GROUPS},{NUM_ROWS}," in compiled.as_text()


def test_ours_has_no_copy_of_the_rows_for_each_group():
    compiled = compile_gradient(choose_grouped_matmul(KernelsConfig(), "gpu"))
    assert not is_dense(compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * ROWS_BYTES


def test_ragged_dot_is_dense():
    """The reason for which "auto" does not choose it: to be thought over when this fails."""
    compiled = compile_gradient("ragged_dot")
    assert is_dense(compiled) and compiled.memory_analysis().temp_size_in_bytes > NUM_GROUPS * ROWS_BYTES
