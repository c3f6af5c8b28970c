"""A batch on its way to the devices: the only code that lays rows out on a mesh."""

from typing import NamedTuple

import jax
import numpy as np

from k2jax.sharding.place import num_stages
from k2jax.sharding.rules import spec


class Batch(NamedTuple):
    """int32 arrays [M, B, T]: M microbatches of B sequences."""

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


def split_rows(rows: dict[str, np.ndarray], num_microbatches: int, mesh: jax.sharding.Mesh) -> Batch:
    """Rows {"tokens" [B, T + 1], "segment_ids" [B, T], "positions" [B, T]} as a Batch on `mesh`."""
    tokens = rows["tokens"]
    arrays = (tokens[:, :-1], tokens[:, 1:], rows["positions"], rows["segment_ids"])
    sharding = jax.NamedSharding(mesh, spec("MBT"))
    return Batch(
        *(jax.device_put(a.reshape(num_microbatches, -1, a.shape[1]).astype(np.int32), sharding) for a in arrays)
    )


def passes(batch: Batch, together: int | None = None) -> Batch:
    """The batch as a stack of what a forward pass takes: a microbatch [B, T], or with pipeline stages many [M, B, T].

    together: how many these are; None: all.
    """
    split = lambda x: x.reshape(-1, together or len(x), *x.shape[1:])  # noqa: E731
    return jax.tree.map(split, batch) if num_stages() > 1 else batch
