"""Whole matrices over a mesh: every matrix on its devices, the same results, and nothing said while they work."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim import MatrixView, make_plan, scale_by_muon
from k2jax.optim.spread import spread
from k2jax.sharding.names import AXES

K2_MESH = dict.fromkeys(AXES, 1) | {"fsdp": 32, "expert": 32}
CASES = {
    "experts": ((3, 8, 16, 32), 2, P(None, "expert", "fsdp", None)),
    "down": ((3, 8, 32, 16), 2, P(None, "expert", None, "fsdp")),
    "heads": ((5, 12, 4, 6), 1, P(None, "fsdp", "tensor", None)),
    "output": ((5, 4, 6, 12), 1, P(None, "tensor", None, "fsdp")),
    "whole": ((7, 6, 10), 1, P(None, None, None)),
    "single": ((16, 32), 0, P("fsdp", None)),
}
MESHES = [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"replica": 2, "fsdp": 2, "context": 2}]


def fits(shape, at_rest, axes):
    return all(size % axes.get(axis, 1) == 0 for size, axis in zip(shape, at_rest, strict=False) if axis)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_each_matrix_is_seen_whole(name, axes, mesh_of):
    """A function that needs whole matrices gives what it gives on one device; padding is zeros and leaves no trace."""
    shape, num_stack, at_rest = CASES[name]
    if not fits(shape, at_rest, axes):
        return
    mesh = mesh_of(**axes)
    plan = make_plan(shape, num_stack, at_rest, mesh.shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def doubled(y):  # [matrices, matrix dims...]: every entry plus the sum of its own matrix
        return y + y.sum(tuple(range(1, y.ndim)), keepdims=True)

    expected = doubled(x.reshape(-1, *shape[num_stack:])).reshape(shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, at_rest))
        y = jax.jit(jax.sharding.auto_axes(spread(doubled, plan), out_sharding=at_rest))(placed)
    assert y.sharding.is_equivalent_to(placed.sharding, y.ndim)
    for shard in y.addressable_shards:  # copies too
        np.testing.assert_allclose(shard.data, expected[shard.index], rtol=0, atol=1e-4)


def test_k2_on_1024_devices():
    """60 layers of 384 experts: 22.5 matrices a device, 23 slots, 2.2 % padding; no axis works on another's copies."""
    shape = (60, 384, 7168, 2048)
    plan = make_plan(shape, 2, P(None, "expert", "fsdp", None), K2_MESH)
    assert (plan.held, plan.group, plan.worked, plan.copies) == (60 * 12, 32, 23, 1)
    assert plan.padding == pytest.approx(1 - 22.5 / 23) and plan.padding < 0.05
    weights = jax.tree.leaves(declarations(ModelConfig()), is_leaf=lambda x: isinstance(x, Weight))
    slots = [make_plan(w.shape, w.num_stack, w.spec, K2_MESH) for w in weights if "E" in w.stack]
    assert len(slots) == 3 and all(p.padding < 0.05 and p.copies == 1 for p in slots)


def test_plan_by_hand():
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
    assert make_plan((6, 8, 4, 4), 2, P(None, "expert", "fsdp", None), sizes)[2:6] == (
        (("fsdp", 0),),
        ("tensor",),
        24,
        6,
    )
    # three matrices on two devices of fsdp: splitting over expert or tensor would only add empty slots
    plan = make_plan((3, 4, 4), 1, P(None, "fsdp", None), sizes)
    assert (plan.joining, plan.worked, plan.copies) == (("expert",), 1, 2)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_collectives_of_a_muon_update(axes, mesh_of):
    """One all-to-all in and one out for each cut axis; where copies share the work one all-gather brings it back.

    Nothing else, in bf16: no gather of a stack, no reduction inside the iteration.
    """
    shape, num_stack, at_rest = (4, 8, 16, 32), 2, P(None, "expert", "fsdp", None)
    mesh = mesh_of(**axes)
    plan = make_plan(shape, num_stack, at_rest, mesh.shape)
    tx = scale_by_muon(dimension_numbers=MatrixView(2, 1, plan))

    def update(grad):
        return tx.update(grad, tx.init(grad))[0]

    with jax.set_mesh(mesh):
        grad = jax.device_put(np.ones(shape, np.float32), jax.NamedSharding(mesh, at_rest))
        text = jax.jit(jax.sharding.auto_axes(update, out_sharding=at_rest)).lower(grad).compile().as_text()
    found = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    assert sorted(found) == ["all-gather"] * len(plan.joining) + ["all-to-all"] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spread_muon_equals_muon_on_one_device(dtype, mesh_of):
    """To rounding: XLA may multiply a batch of another size in another order."""
    rng = np.random.default_rng(0)
    for name, (shape, num_stack, at_rest) in CASES.items():
        mesh = mesh_of(fsdp=2, expert=2, tensor=2)
        grad = rng.normal(size=shape).astype(np.float32)
        updates = []
        for plan in (None, make_plan(shape, num_stack, at_rest, mesh.shape)):
            tx = scale_by_muon(dtype=jnp.dtype(dtype), dimension_numbers=MatrixView(num_stack, 1, plan))
            if name == "output":
                tx = scale_by_muon(dtype=jnp.dtype(dtype), dimension_numbers=MatrixView(num_stack, 2, plan))
            if plan is None:
                updates.append(tx.update(grad, tx.init(grad))[0])
                continue
            with jax.set_mesh(mesh):
                placed = jax.device_put(grad, jax.NamedSharding(mesh, at_rest))
                run = jax.sharding.auto_axes(lambda g, tx=tx: tx.update(g, tx.init(g))[0], out_sharding=at_rest)
                updates.append(jax.jit(run)(placed))
        one, many = map(np.asarray, updates)
        bound = 2e-5 if dtype == "float32" else 0.02
        assert np.linalg.norm(many - one) / np.linalg.norm(one) < bound, name
        assert math.isfinite(np.linalg.norm(one))
