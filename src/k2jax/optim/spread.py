"""Whole matrices on the devices of a mesh: how a leaf that is cut inside its matrices is handed round and back.

A device holds parts of many matrices; Newton-Schulz wants a few whole ones. So the devices that share a set of matrices
exchange parts by all-to-all, work on their share of the set without another word, and exchange the results back.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

WASTE = 1.3  # slots that splitting over one more axis may cost for each slot without it


class Plan(NamedTuple):
    """One leaf's way to whole matrices, on every device alike."""

    spec: P  # the leaf at rest
    num_stack: int  # its leading dims, which count matrices
    moved: tuple[tuple[str, int], ...]  # (axis, dim of one matrix that it cuts): handed round by all-to-all
    joining: tuple[str, ...]  # axes that hold copies, and split the work
    held: int  # matrices that a device has a part of
    worked: int  # matrices that it works on, padding included
    copies: int  # devices that work on the same matrix: those along axes too many to split the work

    @property
    def padding(self) -> float:
        """Share of the worked slots that hold no matrix."""
        return 1 - self.held / (self.worked * self.group)

    group: int = 1  # devices that share the held matrices out


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def make_plan(shape: tuple[int, ...], num_stack: int, spec: P, sizes: Mapping[str, int]) -> Plan:
    """The plan of a leaf [stack..., matrix dims...] that lies as `spec` says on a mesh with axes of these sizes."""
    entries = [_axes(entry) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    held = math.prod(
        size // math.prod(sizes[axis] for axis in entry)
        for size, entry in zip(shape[:num_stack], entries[:num_stack], strict=True)
    )
    moved = tuple((axis, dim) for dim, entry in enumerate(entries[num_stack:]) for axis in entry if sizes[axis] > 1)
    group = math.prod(sizes[axis] for axis, _ in moved)
    joining, copies = [], 1
    for axis in sizes:
        if sizes[axis] == 1 or any(axis in entry for entry in entries):
            continue
        before, after = -(-held // group) * group, -(-held // (group * sizes[axis])) * group * sizes[axis]
        if after <= WASTE * before:
            joining.append(axis)
            group *= sizes[axis]
        else:
            copies *= sizes[axis]
    return Plan(spec, num_stack, moved, tuple(joining), held, -(-held // group), copies, group)


def spread(function: Callable[[jax.Array], jax.Array], plan: Plan) -> Callable[[jax.Array], jax.Array]:
    """`function` of [matrices, matrix dims...], one matrix like another, as a function of the leaf on its mesh.

    Uses the mesh that is set. Nothing is communicated while `function` runs.
    """

    def on_device(x: jax.Array) -> jax.Array:
        stack, matrix = x.shape[: plan.num_stack], x.shape[plan.num_stack :]
        x = x.reshape(-1, *matrix)  # of this device alone, so nothing moves
        x = jnp.pad(x, ((0, plan.worked * plan.group - plan.held), *[(0, 0)] * len(matrix)))
        for axis in plan.joining:
            parts = x.reshape(jax.lax.axis_size(axis), -1, *matrix)
            x = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(axis), keepdims=False)
        for axis, dim in reversed(plan.moved):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dim + 1, tiled=True)
        y = function(x)
        for axis, dim in plan.moved:
            y = jax.lax.all_to_all(y, axis, split_axis=dim + 1, concat_axis=0, tiled=True)
        for axis in reversed(plan.joining):
            y = jax.lax.all_gather(y, axis, tiled=True)
        return y[: plan.held].reshape(*stack, *matrix)

    # what comes back is the same along the joining axes, but the type of an all-gather does not say so
    return jax.shard_map(on_device, in_specs=plan.spec, out_specs=plan.spec, check_vma=False)
