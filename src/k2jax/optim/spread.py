"""Whole matrices on the devices of a mesh: how a leaf that is cut inside its matrices is handed round and back.

A device holds parts of many matrices; Newton-Schulz wants a few whole ones. So the devices that share a set of matrices
exchange parts by all-to-all, work on their share of the set without another word, and exchange the results back.
assignment.py says who works on what.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from k2jax.optim.assignment import Assignment

# Bytes of whole matrices that a device has from others at a time: what it holds beside the leaf is a few times this.
CHUNK_BYTES = 128 * 2**20
# Matrices from this size on fill a chip alone; smaller ones go together.
ALONE_BYTES = 4 * 2**20


def _join(parts: jax.Array, assignment: Assignment) -> jax.Array:
    """Parts [slots, group, local matrix dims...], one from each device, as whole matrices [slots, matrix dims...]."""
    slots, _, *local = parts.shape
    sizes = [jax.lax.axis_size(axis) for axis in assignment.axes]
    first = 1 + len(sizes)  # where the matrix's own dims begin
    order = [0]
    for dim, cut in enumerate(assignment.cuts):
        order += [*(1 + assignment.axes.index(axis) for axis in cut), first + dim]
    counts = [math.prod(map(jax.lax.axis_size, cut)) for cut in assignment.cuts]
    full = [count * size for count, size in zip(counts, local, strict=True)]
    return parts.reshape(slots, *sizes, *local).transpose(order).reshape(slots, *full)


def _split(whole: jax.Array, assignment: Assignment) -> jax.Array:
    """The inverse of `_join`."""
    slots, *full = whole.shape
    shape, places = [slots], {}
    for cut, size in zip(assignment.cuts, full, strict=True):
        for axis in cut:
            places[axis] = len(shape)
            shape.append(jax.lax.axis_size(axis))
        shape.append(size // math.prod(map(jax.lax.axis_size, cut)))
    own = [i for i in range(1, len(shape)) if i not in places.values()]
    parts = whole.reshape(shape).transpose([0, *(places[axis] for axis in assignment.axes), *own])
    return parts.reshape(slots, assignment.group, *(shape[i] for i in own))


def _pads(num: int, num_dims: int) -> list[tuple[int, int]]:
    """Padding of [slots, devices, num_dims dims...] by `num` devices."""
    return [(0, 0), (0, num), *[(0, 0)] * num_dims]


def _exchange(parts: jax.Array, assignment: Assignment) -> jax.Array:
    """[slots, group, ...]: what stands at device d of the group goes to d, and comes from it."""
    return (
        jax.lax.all_to_all(parts, assignment.axes, split_axis=1, concat_axis=1, tiled=True)
        if assignment.axes
        else parts
    )


def _work(function: Callable[[jax.Array], jax.Array], x: jax.Array, has_any: bool | jax.Array) -> jax.Array:
    """`function` of [matrices, matrix dims...], one after the other where they are large; x itself if not `has_any`.

    A loop of zero or more iterations, not lax.cond: a loop updates in place, a branch keeps input and output alive.
    """
    size = 1 if x[0].nbytes >= ALONE_BYTES else len(x)

    def turn(i: jax.Array, x: jax.Array) -> jax.Array:
        done = function(jax.lax.dynamic_slice_in_dim(x, i * size, size))
        return jax.lax.dynamic_update_slice_in_dim(x, done, i * size, 0)

    return jax.lax.fori_loop(0, jnp.where(has_any, len(x) // size, 0), turn, x)


def chunks(assignment: Assignment, matrix: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """(slots, devices) by which matrices of these dims are worked on in their order: so many slots of so many devices.

    itemsize: bytes of an entry on its way.
    """
    devices, rest = divmod(assignment.held, assignment.worked)  # so many are full, and the next one has `rest`
    most = max(CHUNK_BYTES // (math.prod(matrix) * itemsize), 1)
    for slots, with_one in ((rest, devices + 1), (assignment.worked - rest, devices)):
        for start in range(0, slots, most):
            yield min(most, slots - start), with_one


def spread(function: Callable[[jax.Array], jax.Array], assignment: Assignment) -> Callable[[jax.Array], jax.Array]:
    """`function` of [matrices, matrix dims...], one matrix like another, as a function of the leaf on its mesh.

    Uses the mesh that is set. Nothing is communicated while `function` runs; devices without a matrix do not call it.
    """

    def on_chunk(x: jax.Array, slots: int, devices: int) -> jax.Array:
        """Parts [slots * devices, local matrix dims...] of as many matrices, for the first `devices` of the group."""
        local = x.shape[1:]
        parts = jnp.pad(x.reshape(slots, devices, *local), _pads(assignment.group - devices, len(local)))
        whole = _join(_exchange(jnp.roll(parts, assignment.offset, 1), assignment), assignment)
        full = devices == assignment.group
        whole = _work(
            function,
            whole,
            full or (jax.lax.axis_index(assignment.axes) - assignment.offset) % assignment.group < devices,
        )
        parts = jnp.roll(_exchange(_split(whole, assignment), assignment), -assignment.offset, 1)
        return parts[:, :devices].reshape(x.shape)

    def on_device(x: jax.Array) -> jax.Array:
        shape, start = x.shape, 0
        matrix = shape[assignment.num_stack :]
        x = x.reshape(-1, *matrix)  # of this device alone, so nothing moves
        for slots, devices in chunks(assignment, (assignment.group, *matrix), x.dtype.itemsize):
            done = on_chunk(x[start : start + slots * devices], slots, devices)
            x = jax.lax.dynamic_update_slice_in_dim(x, done, start, 0)  # in place: there is no second copy of the leaf
            start += slots * devices
        # XLA would turn the dims back only after widening the result, and then hold all of it in float32.
        return jax.lax.optimization_barrier(x.reshape(shape))

    return jax.shard_map(on_device, in_specs=assignment.spec, out_specs=assignment.spec)
