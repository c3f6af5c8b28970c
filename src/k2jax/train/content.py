"""Digests of a state's content, computed on the devices that hold it: the same on any mesh and number of processes.

Of each element the bits and the place are mixed to 32 bits, and these are summed as integers, once as they are and once
each row weighted by its place, so neither the order of the sum nor the cut of the array matters. The mix is a bijection
of the bits: one changed element always changes the sum. A weighted sum of the bits themselves would miss every pair of
flipped signs, as 2^31 times anything odd is 2^31.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)  # one for each dim
_LEAST = 2**14  # elements that share a digest, at least: a head, an expert, a layer, not a row


def _mix(bits: jax.Array) -> jax.Array:
    """murmur3's finaliser (Appleby, public domain): a bijection of uint32 in which each bit changes half of the others."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def stack_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading dims of an array whose every index has a digest of its own: layers, experts, heads."""
    dims = max(len(shape) - 2, 0)
    while dims and math.prod(shape[dims:]) < _LEAST:
        dims -= 1
    return shape[:dims]


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype.itemsize > 4:
        raise TypeError(f"a state of {x.dtype}: digests are of at most 4 bytes an element")
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)


def _places(shape: tuple[int, ...], firsts: list[jax.Array], odd: tuple[int, ...]) -> jax.Array:
    """uint32 of `shape`: each element's place in the whole array, as one number. firsts: where the part begins."""
    at = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        at += (lax.broadcasted_iota(jnp.uint32, shape, dim) + firsts[dim]) * jnp.uint32(odd[dim])
    return at


def _local_sums(x: jax.Array, whole: tuple[int, ...], firsts: list[jax.Array]) -> jax.Array:
    """uint32 [prod(stack_of(whole)), 2] of the part `x` of an array of shape `whole`, whose first element stands at `firsts`."""
    if not whole:
        return _local_sums(x[None], (1,), [jnp.uint32(0)])
    stack = stack_of(whole)
    dims = len(stack)
    mine, shape = x.shape[:dims], x.shape[dims:]
    place = _places(shape, firsts[dims:], _ODD[dims:])
    row = _places(shape[:-1], firsts[dims:], _ODD[dims:])

    def sums_of(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        part, at = one
        rows = _mix(_bits(part) + _mix(at + place)).sum(-1, dtype=jnp.uint32)
        return jnp.stack([rows.sum(dtype=jnp.uint32), (rows * (at + row | jnp.uint32(1))).sum(dtype=jnp.uint32)])

    # One at a time: XLA's CPU backend keeps all mixed elements of a large sum, which would be a second state.
    ats = _places(mine, firsts[:dims], _ODD).reshape(-1)
    sums = lax.map(sums_of, (x.reshape(-1, *shape), ats)).reshape(*mine, 2)
    own = jnp.zeros((*stack, 2), jnp.uint32)
    return lax.dynamic_update_slice(own, sums, (*firsts[:dims], jnp.uint32(0))).reshape(-1, 2)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _part_sums(x: jax.Array, whole: tuple[int, ...], spec: jax.P) -> tuple[jax.Array, tuple[str, ...]]:
    """(`_local_sums` of this device's part of an array of shape `whole`, the axes of the mesh that cut the array)."""
    cut = [_axes(entry) for entry in (*spec, *[None] * (x.ndim - len(spec)))]
    firsts = [(lax.axis_index(axes) * size if axes else 0) for axes, size in zip(cut, x.shape, strict=True)]
    return _local_sums(x, whole, [jnp.uint32(first) for first in firsts]), sum(cut, ())


def _sums_on(mesh: jax.sharding.Mesh, leaves: list[jax.Array], specs: tuple[jax.P, ...]) -> jax.Array:
    """uint32 [all digests, 2] of arrays that are laid out on `mesh` by `specs`; one sum over all devices."""
    wholes = [x.shape for x in leaves]

    def local(*parts):
        found = []
        for x, whole, spec in zip(parts, wholes, specs, strict=True):
            sums, cut = _part_sums(x, whole, spec)
            copies = [axis for axis in mesh.axis_names if axis not in cut]
            counts = functools.reduce(jnp.logical_and, [lax.axis_index(axis) == 0 for axis in copies], True)
            found.append(jnp.where(counts, sums, jnp.uint32(0)))  # of copies one counts
        return lax.psum(jnp.concatenate(found), mesh.axis_names)

    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)(*leaves)


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _copies_differ(leaves: list[jax.Array], mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]) -> jax.Array:
    """bool [all digests], replicated: the copies that devices have of that part of an array are not all the same."""
    wholes = [x.shape for x in leaves]

    def local(*parts):
        groups: dict[tuple[str, ...], list] = {}  # what is cut along the same axes is summed together
        for number, (x, whole, spec) in enumerate(zip(parts, wholes, specs, strict=True)):
            sums, cut = _part_sums(x, whole, spec)
            groups.setdefault(cut, []).append((number, sums))
        found = {}
        for cut, group in groups.items():
            copies = tuple(axis for axis in mesh.axis_names if axis not in cut)
            sums = lax.psum(jnp.concatenate([sums for _, sums in group]), cut)
            differ = (lax.pmax(sums, copies) != lax.pmin(sums, copies)).any(-1)
            ends = np.cumsum([len(sums) for _, sums in group])[:-1]
            found |= dict(zip([number for number, _ in group], jnp.split(differ, ends), strict=True))
        return jnp.concatenate([found[number] for number in range(len(parts))])

    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)(*leaves)


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _sums(leaves: list[jax.Array], mesh: jax.sharding.Mesh | None, specs: tuple[jax.P, ...]) -> jax.Array:
    if mesh is None:
        return jnp.concatenate([_local_sums(x, x.shape, [jnp.uint32(0)] * x.ndim) for x in leaves])
    return _sums_on(mesh, leaves, specs)


def _layout(leaves: list[jax.Array]) -> tuple[jax.sharding.Mesh | None, tuple[jax.P, ...]]:
    """The one mesh that they are on, None for one device, and the spec of each."""
    shardings = [x.sharding for x in leaves]
    meshes = {s.mesh for s in shardings if isinstance(s, jax.NamedSharding)}
    if not meshes:
        return None, ()
    (mesh,) = meshes
    return mesh, tuple(s.spec if isinstance(s, jax.NamedSharding) else jax.P() for s in shardings)


def content_sums(tree) -> jax.Array:
    """The digests of all arrays of `tree`, uint32 [N, 2], replicated: begun when this returns, like any computation.

    The arrays are on one mesh, or all on one device.
    """
    leaves = jax.tree.leaves(tree)
    mesh, specs = _layout(leaves)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return _sums(leaves, mesh, specs)


def name_of(path: tuple) -> str:
    """The name of an array by its path in a tree of items: "model.params.moe.ffn.gate"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_digests(tree, sums: np.ndarray) -> dict[str, str]:
    """{path of an array: its digests, 16 hex digits for each index of its stack dims}, of `content_sums(tree)`.

    tree: its arrays, or what has their shapes.
    """
    digests, at = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(stack_of(leaf.shape))
        digests[name_of(path)] = sums[at : at + size].astype(">u4").tobytes().hex()
        at += size
    return digests


def differing_copies(tree) -> np.ndarray:
    """bool [all digests]; all False where everything is on one device."""
    leaves = jax.tree.leaves(tree)
    mesh, specs = _layout(leaves)
    if mesh is None:
        return np.zeros(sum(math.prod(stack_of(x.shape)) for x in leaves), bool)
    with jax.set_mesh(mesh):
        return np.asarray(jax.device_get(_copies_differ(leaves, mesh, specs)))


def content_problems(tree, expected: dict[str, str]) -> list[str]:
    """All places where the content of `tree`, on any of its devices, is not that of the digests `expected`.

    expected: may be of a larger tree.
    """
    problems, leaves, at = [], jax.tree.leaves(tree), 0
    found = named_digests(tree, np.asarray(jax.device_get(content_sums(tree))))
    differ = differing_copies(tree)  # the digests are of one copy
    for (name, digests), leaf in zip(found.items(), leaves, strict=True):
        due, shape = expected.get(name, ""), stack_of(leaf.shape)
        total = math.prod(shape)
        same = [digests[16 * i : 16 * i + 16] == due[16 * i : 16 * i + 16] for i in range(total)]
        wrong = [i for i in range(total) if not same[i] or differ[at + i]]
        at += total
        if wrong:
            places = [str([int(index) for index in np.unravel_index(i, shape)]) for i in wrong] if shape else []
            rest = " and others" if len(places) > 4 else ""
            problems.append(
                f"{name}{' and '.join(places[:4])}{rest}: is not what was saved, in {len(wrong)} of {total} parts"
            )
    return problems
