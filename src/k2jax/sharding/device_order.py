"""The order of devices in the mesh: axes that talk little cross the slow network, the others stay inside the fast one.

A fast domain is what one fast network joins: a TPU slice by its torus, the GPUs of a host, or of a rack, by NVLink.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from jax.experimental import mesh_utils

from k2jax.errors import UserError
from k2jax.sharding.names import AXES

# Axes that may cross the slow network, the first ones rather. Between TPU slices it is the data centre's, far slower
# than the torus; GPUs have a network card each, so matrices and tokens may be exchanged over it, if need be.
SLOW_AXES = ("replica", "stage")
SLOW_AXES_OF_GPUS = ("replica", "stage", "fsdp", "expert")
# jax splits a dim of the torus between axes only where it is asked, and asks for these kinds itself in jax.make_mesh.
SPLITTABLE = ("TPU v5 lite", "TPU v5e")


# Of devices that are compiled for alone: there jax gives all GPUs the `slice_index` 0, whatever was asked for.
_DOMAIN_OF_ABSENT = {}


def enter_domains(devices: list, domain_size: int) -> None:
    """Say that so many devices of a topology that is not here, one after another, are a fast domain each."""
    _DOMAIN_OF_ABSENT.update((device, number // domain_size) for number, device in enumerate(devices))


def domain_of(device) -> int:
    """Number of the fast domain of a device.

    jax gives `slice_index` to TPUs and to GPUs, of which those of one host are a slice, unless JAX_PARTITION_INDEX says
    which hosts one NVLink domain joins. GPUs without it: a process is a domain. CPUs of all processes are one.
    """
    if device in _DOMAIN_OF_ABSENT:
        return _DOMAIN_OF_ABSENT[device]
    if (index := getattr(device, "slice_index", None)) is not None:
        return index
    return device.process_index if device.platform == "gpu" else 0


def slow_axes(devices: list) -> tuple[str, ...]:
    """The axes that may cross the network between the fast domains of such devices."""
    return SLOW_AXES_OF_GPUS if devices[0].platform == "gpu" else SLOW_AXES


def domain_noun(devices: list) -> str:
    """A word for a fast domain of such devices, with a regular plural."""
    return "NVLink domain" if devices[0].platform == "gpu" else "slice"


def outer_sizes(sizes: dict[str, int], num_domains: int, axes: tuple[str, ...]) -> dict[str, int] | None:
    """Of each axis, the factor that counts domains; None if the product of `axes` is not a multiple of `num_domains`.

    The first of `axes` has as much as it can, then the next.
    """
    outer, left = dict.fromkeys(sizes, 1), num_domains
    for axis in axes:
        outer[axis] = math.gcd(sizes[axis], left)
        left //= outer[axis]
    return outer if left == 1 else None


def order_domain(sizes: dict[str, int], devices: list) -> np.ndarray:
    """Devices of one fast domain [*sizes]. Raises NotImplementedError if they stand in a torus without such axes."""
    split = devices[0].device_kind in SPLITTABLE
    return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=split)


def _meshes(size: int, num_axes: int) -> Iterator[tuple[int, ...]]:
    """All sizes of `num_axes` axes whose product is `size`."""
    if num_axes == 1:
        yield (size,)
        return
    for first in (d for d in range(1, size + 1) if size % d == 0):
        yield from ((first, *rest) for rest in _meshes(size // first, num_axes - 1))


def nearest_mesh(sizes: dict[str, int], domains: list[list]) -> dict[str, int]:
    """The sizes of all axes, of the same product, that fit the domains and whose ratios to `sizes` are the least.

    Of several as near, the one that leaves tensor, context, expert and stage, in this order, rather as they are.
    """

    def distance(mesh: dict[str, int]) -> tuple[float, ...]:
        changes = {axis: abs(math.log(mesh[axis] / sizes[axis])) for axis in AXES}
        kept = (changes[axis] for axis in ("tensor", "context", "expert", "stage"))
        return round(sum(changes.values()), 6), *kept

    def fits(mesh: dict[str, int]) -> bool:
        outer = outer_sizes(mesh, len(domains), slow_axes(domains[0]))
        if outer is None:
            return False
        try:
            order_domain({axis: mesh[axis] // outer[axis] for axis in AXES}, domains[0])
        except NotImplementedError:
            return False
        return True

    meshes = (dict(zip(AXES, each, strict=True)) for each in _meshes(math.prod(sizes.values()), len(AXES)))
    return next(mesh for mesh in sorted(meshes, key=distance) if fits(mesh))  # all of it on replica always fits


def _not_a_multiple(sizes: dict[str, int], domains: list[list]) -> UserError:
    """The message for a mesh that would have to cross the slow network along an axis that must not."""
    axes = slow_axes(domains[0])
    given = " * ".join(f"mesh.{axis} = {sizes[axis]}" for axis in axes)
    others = ", ".join(axis for axis in AXES if axis not in axes)
    near = nearest_mesh(sizes, domains)
    changed = ", ".join(f"mesh.{axis} = {size}" for axis, size in near.items() if size != sizes[axis])
    message = (
        f"{given}: must be a multiple of the {len(domains)} {domain_noun(domains[0])}s, or {others} would "
        f"cross the slow network between them; nearest: {changed}"
    )
    if domains[0][0].platform == "gpu":
        message += ". Hosts whose GPUs one NVLink domain joins count as one if JAX_PARTITION_INDEX is the same on them"
    return UserError(message)


def fast_domains(devices: list) -> list[list]:
    """The devices of each fast domain, in the order of their processes; the order of `devices` does not matter."""
    domains = defaultdict(list)
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        domains[domain_of(device)].append(device)
    return list(domains.values())


def domain_counts(sizes: dict[str, int], domains: list[list]) -> dict[str, int]:
    """Of each axis, the factor that counts domains.

    Raises UserError if the domains differ in their numbers of devices, or if an axis would cross the slow network that
    must not.
    """
    by_size = sorted(domains, key=len)
    few, many = by_size[0], by_size[-1]
    noun = domain_noun(few)
    if len(few) != len(many):
        raise UserError(
            f"{noun} {domain_of(few[0])}: has {len(few)} devices, {noun} {domain_of(many[0])} has {len(many)}; "
            f"all must have as many"
        )
    if (outer := outer_sizes(sizes, len(domains), slow_axes(few))) is None:
        raise _not_a_multiple(sizes, domains)
    return outer


def order_domains(sizes: dict[str, int], outer: dict[str, int], domains: list[list]) -> np.ndarray:
    """Devices of several fast domains [*sizes], each domain a block of it and laid out as a mesh of its own.

    Raises NotImplementedError if their torus does not have such axes.
    """
    inner = {axis: size // outer[axis] for axis, size in sizes.items()}
    blocks = np.empty(len(domains), object)
    blocks[:] = [order_domain(inner, domain) for domain in domains]
    return np.block(blocks.reshape(tuple(outer[axis] for axis in sizes)).tolist())


def crossed_axes(mesh_devices: np.ndarray, number_of: Callable) -> list[str]:
    """The axes along which neighbours of the mesh [*AXES] ever differ in `number_of(device)`."""
    numbers = np.vectorize(number_of, otypes=[int])(mesh_devices)
    return [axis for dim, axis in enumerate(AXES) if np.diff(numbers, axis=dim).any()]
