"""XLA:GPU needs each of our options: the day that one of these tests fails, its option may go. `make test-gpu`."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from k2jax.config import MeshConfig
from k2jax.plan.topology import topology_mesh
from k2jax.sharding.compile_options import OPTIONS, WITHOUT_DEVICE, compile_options, options_without_device
from k2jax.sharding.place import replicated

pytestmark = pytest.mark.gpu


def compile_for(mesh, function, specs, *shapes, left_out=None) -> str:
    """The program of function(arrays of these shapes, bf16, laid out by `specs`) under all options but one."""
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    options = compile_options("gpu") | options_without_device(mesh)
    if left_out is not None:
        del options[left_out]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile(compiler_options=options).as_text()


def reduced_in(text: str) -> set[str]:
    """Dtypes of the arrays that all-reduces take."""
    return set(re.findall(r" = \(?(\w+)\[[\d,]+\]\S* all-reduce(?:-start)?\(", text))


def test_reassociated_sums_are_in_bf16():
    """The gradient of a weight whose two halves are marked one by one, as MLA's were."""
    mesh = topology_mesh(MeshConfig(fsdp=8), "h100:1x8")

    def part(w, x):
        halves = [replicated(half, ("fsdp",)) for half in (w[:, :128], w[:, 128:])]
        return (jnp.tanh(x @ halves[0]) + jnp.sin(x @ halves[1])).sum(keepdims=True)

    def gradient(w, x):
        loss = jax.shard_map(part, in_specs=(jax.P(), jax.P("fsdp")), out_specs=jax.P("fsdp"))
        return jax.grad(lambda w: loss(w, x).sum())(w)

    specs, shapes = (jax.P(), jax.P("fsdp")), ((128, 256), (256, 128))
    assert reduced_in(compile_for(mesh, gradient, specs, *shapes)) == {"f32"}
    assert "bf16" in reduced_in(compile_for(mesh, gradient, specs, *shapes, left_out="xla_disable_hlo_passes"))


def test_an_exchange_between_hosts_becomes_an_all_gather():
    mesh = topology_mesh(MeshConfig(expert=16), "h100:2x8")

    def exchange(x):
        def local(x):
            offset, size = jnp.arange(16, dtype=jnp.int32) * 8, jnp.full(16, 8, jnp.int32)
            out = jnp.zeros_like(x)
            there = jnp.full(16, 8, jnp.int32) * lax.axis_index("expert")
            return lax.ragged_all_to_all(x, out, offset, size, there, size, axis_name="expert")

        return jax.shard_map(local, in_specs=jax.P("expert"), out_specs=jax.P("expert"), check_vma=False)(x)

    name = "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer"
    arguments = mesh, exchange, (jax.P("expert"),), (16 * 128, 256)
    text = compile_for(*arguments)
    assert "ragged-all-to-all" in text and "all-gather" not in text
    decomposed = "all-gather" in compile_for(*arguments, left_out=name)
    assert decomposed == (jax.__version_info__ >= (0, 11))  # jax 0.10's XLA has the option and leaves it off


def test_a_sort_asks_the_absent_device():
    mesh = topology_mesh(MeshConfig(), "h100:1x1")
    arguments = mesh, lambda x: jnp.sort(x, 0), (jax.P(),), (1 << 20,)
    compile_for(*arguments)
    with pytest.raises(jax.errors.JaxRuntimeError, match="cudaErrorInvalidDevice"):
        compile_for(*arguments, left_out="xla_gpu_enable_cub_radix_sort")


def test_each_has_a_test_here():
    """A new option is to be added above."""
    assert {option.name for option in (*OPTIONS["gpu"], *WITHOUT_DEVICE["gpu"])} == {
        "xla_disable_hlo_passes",
        "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer",
        "xla_gpu_enable_cub_radix_sort",
    }
