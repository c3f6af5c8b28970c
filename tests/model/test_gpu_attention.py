"""MLA's gradient compiled for H100: kv_b is reduced once, in float32, whatever passes XLA runs. `make test-gpu`."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from k2jax.config import MeshConfig
from k2jax.model.mla import MLA
from k2jax.model.rope import make_rope
from k2jax.model.transformer import make_positions
from k2jax.model.weights import Stack
from k2jax.plan.topology import topology_mesh
from k2jax.sharding.compile_options import options_without_device
from k2jax.sharding.place import place
from k2jax.sharding.rules import spec

pytestmark = pytest.mark.gpu


def test_kv_b_is_reduced_in_float32(tiny):
    config = dataclasses.replace(tiny, qk_nope_head_dim=16, v_head_dim=16, num_hidden_layers=1)
    mesh = topology_mesh(MeshConfig(fsdp=4, expert=2), "h100:1x8")
    graph, declared = nnx.split(MLA(Stack(config, 0, 1)))

    def abstract(variable):
        cut = tuple(variable.weight.spec(mesh.shape))[1:]  # of one layer
        sharding = jax.NamedSharding(mesh, jax.P(*cut))
        return jax.ShapeDtypeStruct(variable.weight.shape[1:], jnp.float32, sharding=sharding)

    params = nnx.to_pure_dict(jax.tree.map(abstract, declared, is_leaf=lambda v: isinstance(v, nnx.Variable)))
    x = jax.ShapeDtypeStruct((8, 64, config.hidden_size), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec("BTD")))

    def loss(params, x):
        index = place(jnp.broadcast_to(jnp.arange(64), (8, 64)), "BT")
        positions = make_positions(index, jnp.zeros_like(index), make_rope(config, "plain"))
        out, _ = nnx.merge(graph, params)(x, positions)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile(compiler_options=options_without_device(mesh))
    reductions = re.findall(r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert reductions and {dtype for result in reductions for dtype in re.findall(r"(\w+)\[", result)} == {"f32"}
