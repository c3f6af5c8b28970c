"""The device mesh: five named axes, all Explicit, all always there."""

import math

import jax
from jax.sharding import AxisType

from k2jax.config import MeshConfig, UserError
from k2jax.sharding.names import AXES


def make_mesh(config: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (all there are, by default).

    Raises UserError where the axis sizes are below 1 or do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(getattr(config, axis) for axis in AXES)
    if min(shape) < 1:
        wrong = [axis for axis, size in zip(AXES, shape, strict=True) if size < 1]
        raise UserError(*(f"mesh.{axis} = {getattr(config, axis)}: must be at least 1" for axis in wrong))
    if math.prod(shape) != len(devices):
        product = " * ".join(f"mesh.{axis} = {size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        raise UserError(
            f"{product or 'the mesh (all axes 1)'}: needs {math.prod(shape)} devices, there are {len(devices)}; "
            f"change the axes, or on a CPU give --simulate {math.prod(shape)}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, by axis: mesh_of(expert=4, tensor=2) takes eight.

    Raises UserError for an unknown axis, or for more devices than there are.
    """
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise UserError(*(f"{axis}: is no mesh axis; there are {', '.join(AXES)}" for axis in unknown))
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def single_device_mesh() -> jax.sharding.Mesh:
    """All axes 1: for generation, and for a reference to compare with."""
    return make_mesh(MeshConfig(), jax.devices()[:1])
