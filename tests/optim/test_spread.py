"""Whole matrices over a mesh: every matrix on its devices, the same results, and nothing said while they work."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import k2jax.optim.spread as spread_module
from k2jax.optim import MatrixView, make_assignment, scale_by_muon
from k2jax.optim.spread import chunks, spread
from k2jax.sharding.names import AXES

CASES = {
    "experts": ((3, 8, 16, 32), 2, P(None, "expert", "fsdp", None)),
    "down": ((3, 8, 32, 16), 2, P(None, "expert", None, ("fsdp", "tensor"))),
    "heads": ((5, 16, 4, 6), 1, P(None, ("fsdp", "context"), ("tensor", "expert"), None)),
    "output": ((5, 8, 6, 16), 1, P(None, ("tensor", "expert"), None, "fsdp")),
    "whole": ((7, 6, 10), 1, P(None, None, None)),
    "single": ((16, 32), 0, P("expert", "fsdp")),
}
MESHES = [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"replica": 2, "fsdp": 2, "context": 2}]


def fits(shape, at_rest, mesh):
    cuts = [(entry,) if isinstance(entry, str) else entry or () for entry in at_rest]
    return all(size % math.prod(mesh.shape[a] for a in cut) == 0 for size, cut in zip(shape, cuts, strict=True))


def with_offset(assignment):
    """The assignment beginning with the last device but one of the group, so that its matrices go around the end."""
    return assignment._replace(offset=max(assignment.group - 2, 0))


@pytest.mark.parametrize("chunk_bytes", [spread_module.CHUNK_BYTES, 5000])
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_each_matrix_is_seen_whole(name, axes, chunk_bytes, mesh_of, monkeypatch):
    """A function that needs whole matrices gives what it gives on one device, at once or two or three at a time."""
    monkeypatch.setattr(spread_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(spread_module, "ALONE_BYTES", chunk_bytes // 4)
    shape, num_stack, at_rest = CASES[name]
    mesh = mesh_of(**axes)
    if not fits(shape, at_rest, mesh):
        return
    assignment = with_offset(make_assignment(shape, num_stack, at_rest, mesh.shape))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def doubled(y):  # [matrices, matrix dims...]: every entry plus the sum of its own matrix
        return y + y.sum(tuple(range(1, y.ndim)), keepdims=True)

    expected = doubled(x.reshape(-1, *shape[num_stack:])).reshape(shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, at_rest))
        y = jax.jit(jax.sharding.auto_axes(spread(doubled, assignment), out_sharding=at_rest))(placed)
    assert y.sharding.is_equivalent_to(placed.sharding, y.ndim)
    for shard in y.addressable_shards:  # copies too
        np.testing.assert_allclose(shard.data, expected[shard.index], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("held", "group"), [(1, 8), (5, 8), (8, 8), (9, 8), (22, 8), (360, 16), (7, 1)])
def test_chunks_are_the_plan(held, group):
    """Work by chunks covers each held matrix once, on as many devices as the assignment says."""
    assignment = make_assignment((held, group, 4), 1, P(None, "fsdp", None), dict.fromkeys(AXES, 1) | {"fsdp": group})
    found = np.zeros(group, int)
    for slots, devices in chunks(assignment, (2**20, 32), 4):  # one at a time
        assert slots == 1
        found[:devices] += slots
    assert found.tolist() == assignment.per_device().tolist()
    assert found.sum() == held and found.max() == assignment.worked


def test_devices_without_a_matrix_do_not_work(mesh_of):
    """Three matrices for four devices, beginning at the third: the second has none, and calls nothing."""
    mesh, at_rest = mesh_of(fsdp=4), P(None, "fsdp", None)
    assignment = make_assignment((3, 4, 4), 1, at_rest, mesh.shape)._replace(offset=2)
    assert assignment.per_device().tolist() == [1, 0, 1, 1]
    called = []

    def noted(y):
        jax.debug.callback(lambda y: called.append(float(y[0, 0, 0])), y)
        return y

    with jax.set_mesh(mesh):
        x = jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 4, 4))
        placed = jax.device_put(x, jax.NamedSharding(mesh, at_rest))
        run = jax.sharding.auto_axes(spread(noted, assignment), out_sharding=at_rest)
        jax.block_until_ready(jax.jit(run)(placed))
        jax.effects_barrier()
    assert sorted(called) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spread_muon_equals_muon_on_one_device(dtype, mesh_of):
    """To rounding: XLA may multiply a batch of another size in another order."""
    rng = np.random.default_rng(0)
    for name, (shape, num_stack, at_rest) in CASES.items():
        mesh = mesh_of(fsdp=2, expert=2, tensor=2)
        grad = rng.normal(size=shape).astype(np.float32)
        updates = []
        for assignment in (None, with_offset(make_assignment(shape, num_stack, at_rest, mesh.shape))):
            tx = scale_by_muon(dtype=jnp.dtype(dtype), dimension_numbers=MatrixView(num_stack, 1, assignment))
            if name == "output":
                tx = scale_by_muon(dtype=jnp.dtype(dtype), dimension_numbers=MatrixView(num_stack, 2, assignment))
            if assignment is None:
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
