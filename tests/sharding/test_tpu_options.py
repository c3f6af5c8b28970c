"""The tiles that the TPU's compiler gives K2's matmuls of experts with our options, compiled without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from k2jax.plan.topology import topology_devices
from k2jax.sharding.compile_options import OPTIONS, compile_options

ROWS, HIDDEN, WIDTH, EXPERTS = 131_072, 7168, 4096, 6  # of one device: rows, and gate and up side by side


@pytest.mark.tpu
def test_rows_are_read_a_quarter_as_often():
    """By default the kernel takes 128 columns at a time. If this fails for that, libtpu needs the option no longer."""
    place = jax.sharding.SingleDeviceSharding(topology_devices("v5p:2x2x1")[0])
    shapes = ((ROWS, HIDDEN), jnp.bfloat16), ((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16), ((EXPERTS,), jnp.int32)
    lowered = jax.jit(jax.lax.ragged_dot).lower(*(jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes))

    def columns(options):
        found = re.findall(r'ragged_dot_tiling="\d+,\d+,(\d+)"', lowered.compile(compiler_options=options).as_text())
        return [int(n) for n in found]

    assert columns({}) == [128]
    assert columns(compile_options("tpu")) == [512]


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_sparse_core_runs_collectives_where_there_is_one(topology):
    """Every generation takes the options; v5p and v6e give collectives to SparseCore with them alone."""
    devices = topology_devices(topology)
    mesh, cut = jax.sharding.Mesh(devices, ("fsdp",)), jax.P("fsdp")

    def layer(x, w):
        y = jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True))
        return jax.lax.psum_scatter(y, "fsdp", scatter_dimension=1, tiled=True)

    shapes = (2048 * len(devices), 4096), (4096, 4096)
    arguments = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=jax.NamedSharding(mesh, cut)) for s in shapes)
    lowered = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=cut, out_specs=cut)).lower(*arguments)
    found = [
        "custom-call-start(" in lowered.compile(compiler_options=options).as_text()
        for options in ({}, compile_options("tpu"))
    ]
    expected = {"v4": [False, False], "v5e": [False, False], "tpu7x": [True, True]}
    assert found == expected.get(topology.split(":")[0], [False, True])


def test_every_option_has_a_reason():
    for options in OPTIONS.values():
        assert len({option.name for option in options}) == len(options)
        assert all(option.reason for option in options)
    assert compile_options("tpu")["xla_tpu_scoped_vmem_limit_kib"] == 28_672
