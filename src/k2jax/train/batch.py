"""A batch on its way to the devices: the only code that lays rows out on a mesh."""

import functools
from dataclasses import dataclass
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


@dataclass(frozen=True)
class BatchLayout:
    """The way from a batch's rows to the mesh, by arithmetic: a process reads those rows that its devices need.

    num_rows: sequences of the batch, all microbatches together. length: T, positions of a sequence.
    """

    mesh: jax.sharding.Mesh
    num_microbatches: int
    num_rows: int
    length: int

    @functools.cached_property
    def parts(self) -> dict[jax.Device, tuple[np.ndarray, slice]]:
        """For each device of the mesh the rows [m, b] and the positions of its part."""
        numbers = np.arange(self.num_rows).reshape(self.num_microbatches, -1)
        sharding = jax.NamedSharding(self.mesh, spec("MBT"))
        found = sharding.devices_indices_map((*numbers.shape, self.length))
        return {device: (numbers[index[:2]], index[2]) for device, index in found.items()}

    def places_for(self, devices: list[jax.Device]) -> np.ndarray:
        """int64, sorted: rows of the batch of which any of these devices has a part."""
        return np.unique(np.concatenate([self.parts[device][0].ravel() for device in devices]))

    @functools.cached_property
    def places(self) -> np.ndarray:
        """The rows that this process needs, as `places_for` its devices."""
        return self.places_for(list(self.mesh.local_devices))

    def on_mesh(self, values: np.ndarray) -> jax.Array:
        """int32 [M, B, T] on the mesh, of the rows [P, T] at `places`."""
        own = {device: self.parts[device] for device in self.mesh.local_devices}
        pieces = [values[np.searchsorted(self.places, rows), positions] for rows, positions in own.values()]
        # Explicit copies, which the loop's transfer guard allows; jax's own helpers for many processes make implicit ones.
        arrays = jax.device_put([piece.astype(np.int32) for piece in pieces], list(own))
        shape = self.num_microbatches, self.num_rows // self.num_microbatches, self.length
        return jax.make_array_from_single_device_arrays(shape, jax.NamedSharding(self.mesh, spec("MBT")), arrays)

    def split(self, rows: dict[str, np.ndarray]) -> Batch:
        """The rows at `places`, {"tokens" [P, T + 1], "segment_ids" [P, T], "positions" [P, T]}, as a Batch."""
        tokens = rows["tokens"]
        return Batch(*map(self.on_mesh, (tokens[:, :-1], tokens[:, 1:], rows["positions"], rows["segment_ids"])))


def passes(batch: Batch, together: int | None = None) -> Batch:
    """The batch as a stack of what a forward pass takes: a microbatch [B, T], or with pipeline stages many [M, B, T].

    together: how many these are; None: all.
    """
    split = lambda x: x.reshape(-1, together or len(x), *x.shape[1:])  # noqa: E731
    return jax.tree.map(split, batch) if num_stages() > 1 else batch
