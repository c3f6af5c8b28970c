"""The device mesh: six named axes, all Explicit, all always there."""

import itertools
import math

import jax
from jax.sharding import AxisType

from k2jax.config import MeshConfig
from k2jax.errors import UserError
from k2jax.sharding.device_order import domain_counts, fast_domains, order_domains
from k2jax.sharding.names import AXES
from k2jax.words import counted


def nearest_on_torus(sizes: dict[str, int], torus: tuple[int, ...]) -> dict[str, int]:
    """Sizes of the same axes that a torus can have: each the product of some of its dims, all of them used.

    The nearest by their ratios; of axes that are 1 only where there is none larger.
    """
    axes = [axis for axis, size in sizes.items() if size > 1] or list(sizes)
    found = []
    for owners in itertools.product(axes, repeat=len(torus)):
        own = {axis: math.prod(dim for dim, owner in zip(torus, owners) if owner == axis) for axis in axes}
        found.append((sum(abs(math.log(own[axis] / sizes[axis])) for axis in axes), own))
    return min(found, key=lambda entry: entry[0])[1]


def _off_torus(sizes: dict[str, int], outer: dict[str, int], devices: list) -> UserError:
    """The message for a mesh whose axes would have to share a dim of the torus that TPUs stand in.

    outer: of each axis, the factor that counts slices; devices: those of one slice.
    """
    torus = tuple(max(at) + 1 for at in zip(*(device.coords for device in devices), strict=True))
    given = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items() if size > 1)
    inner = nearest_on_torus({axis: size // outer[axis] for axis, size in sizes.items()}, torus)
    near = {axis: inner.get(axis, 1) * outer[axis] for axis in sizes}
    nearest = ", ".join(f"mesh.{axis} = {size}" for axis, size in near.items() if axis in inner or size > 1)
    whose = "its factor inside a slice" if math.prod(outer.values()) > 1 else "each"
    rule = f"{whose} must be a product of some of the dims of the torus, {' x '.join(map(str, torus))}"
    return UserError(f"{given}: {rule}, or neighbours in the mesh would not be neighbours; nearest: {nearest}")


def _other_number(needed: int) -> str:
    """The way to a mesh of `needed` devices by other devices: of one process, or of each of several."""
    if (count := jax.process_count()) == 1:
        return f"on a CPU give --simulate {needed}"
    if needed % count:
        return f"start another number of processes than {count}"
    each = needed // count
    return f"on CPUs give each of the {count} processes {each} by --simulate, or launch local's --devices-per-process"


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (all there are, by default).

    Raises UserError if the axis sizes are below 1, do not multiply to the number of devices, do not fit the torus that
    TPUs stand in, or would have an axis cross the slow network that must not (`device_order`).
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if wrong := [axis for axis, size in sizes.items() if size < 1]:
        raise UserError(*(f"mesh.{axis} = {sizes[axis]}: must be at least 1" for axis in wrong))
    if (needed := math.prod(sizes.values())) != len(devices):
        product = " * ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"{product or 'the mesh (all axes 1)'}: needs {counted(needed, 'device')}, "
            f"there {'are' if len(devices) > 1 else 'is'} {len(devices)}; change the axes, or {_other_number(needed)}"
        )
    types, outer = (AxisType.Explicit,) * len(AXES), dict.fromkeys(AXES, 1)
    domains = fast_domains(devices)
    try:
        if len(domains) == 1:
            return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=domains[0])
        outer = domain_counts(sizes, domains)
        return jax.sharding.Mesh(order_domains(sizes, outer, domains), AXES, axis_types=types)
    except NotImplementedError:  # jax's, for a torus alone
        raise _off_torus(sizes, outer, domains[0]) from None


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, by axis: mesh_of(expert=4, tensor=2) takes eight.

    Raises UserError for an unknown axis, or for more devices than there are.
    """
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise UserError(*(f"{axis}: is not a mesh axis; there are {', '.join(AXES)}" for axis in unknown))
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def single_device_mesh() -> jax.sharding.Mesh:
    """All axes 1, on this process's first device: for a reference to compare with."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])
