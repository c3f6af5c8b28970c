"""Rows on their way to a mesh: each process reads those of its devices and no others, and they arrive where they belong."""

import jax
import numpy as np
import pytest

from k2jax.train.batch import BatchLayout

# Mesh: rows that a process reads of a batch of 128 in 2 microbatches, for 1, 2, 4 devices a process.
TABLE = {
    "fsdp 8": ({"fsdp": 8}, (16, 32, 64)),
    "expert 8": ({"expert": 8}, (16, 32, 64)),
    "replica 2 fsdp 4": ({"replica": 2, "fsdp": 4}, (16, 32, 64)),
    "fsdp 2 expert 2 tensor 2": ({"fsdp": 2, "expert": 2, "tensor": 2}, (32, 32, 64)),
    "context 8": ({"context": 8}, (128, 128, 128)),
    "tensor 8": ({"tensor": 8}, (128, 128, 128)),
    "stage 2 fsdp 4": ({"stage": 2, "fsdp": 4}, (32, 64, 128)),
}
B, M, T = 128, 2, 16


def rows() -> dict[str, np.ndarray]:
    """Every number says its row and place."""
    return {
        "tokens": np.arange(B * (T + 1), dtype=np.int64).reshape(B, T + 1),
        "positions": np.arange(B * T).reshape(B, T) + 10_000,
        "segment_ids": np.arange(B * T).reshape(B, T) + 20_000,
    }


def needed(mesh, devices) -> set[int]:
    """By an array of the rows' own numbers that jax itself lays out, as the model's inputs are."""
    spec = jax.P(None, ("replica", "fsdp", "expert"), ("context", "tensor"))
    numbers = np.broadcast_to(np.arange(B).reshape(M, -1, 1), (M, B // M, T))
    array = jax.device_put(numbers, jax.NamedSharding(mesh, spec))
    return {int(n) for shard in array.addressable_shards if shard.device in devices for n in np.unique(shard.data)}


@pytest.mark.parametrize("name", TABLE)
def test_a_process_needs_the_rows_of_its_devices(mesh_of, name):
    sizes, counts = TABLE[name]
    mesh = mesh_of(**sizes)
    layout, devices = BatchLayout(mesh, M, B, T), list(mesh.devices.flat)
    for per_process, count in zip((1, 2, 4), counts, strict=True):
        groups = [devices[i : i + per_process] for i in range(0, 8, per_process)]
        places = [layout.places_for(group) for group in groups]
        assert {len(part) for part in places} == {count}
        assert {int(row) for part in places for row in part} == set(range(B))
        for group, part in zip(groups, places, strict=True):
            assert part.tolist() == sorted(needed(mesh, group))


@pytest.mark.parametrize("name", TABLE)
def test_rows_arrive_where_they_belong(mesh_of, name):
    mesh = mesh_of(**TABLE[name][0])
    layout, whole = BatchLayout(mesh, M, B, T), rows()
    assert layout.places.tolist() == list(range(B))
    batch = layout.split(whole)
    assert np.array_equal(batch.inputs, whole["tokens"][:, :-1].reshape(M, -1, T))
    assert np.array_equal(batch.targets, whole["tokens"][:, 1:].reshape(M, -1, T))
    assert np.array_equal(batch.positions, whole["positions"].reshape(M, -1, T))
    assert np.array_equal(batch.segment_ids, whole["segment_ids"].reshape(M, -1, T))
    assert {array.dtype for array in batch} == {np.dtype("int32")}
