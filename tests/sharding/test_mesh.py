"""The mesh and what is said when it does not fit."""

import math

import jax
import pytest
from jax.sharding import AxisType

from k2jax.config import MeshConfig
from k2jax.errors import UserError
from k2jax.sharding.mesh import make_mesh, nearest_on_torus, single_device_mesh
from k2jax.sharding.names import AXES


def test_wrong_number_of_devices_names_the_axes_and_both_numbers():
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(fsdp=3, tensor=2))
    assert str(error.value) == (
        "mesh.fsdp = 3 * mesh.tensor = 2: needs 6 devices, there are 8; change the axes, or on a CPU give --simulate 6"
    )
    with pytest.raises(UserError, match="^the mesh \\(all axes 1\\): needs 1 device, there are 8; "):
        make_mesh(MeshConfig())
    with pytest.raises(UserError, match="^mesh.fsdp = 2: needs 2 devices, there is 1; "):
        make_mesh(MeshConfig(fsdp=2), jax.devices()[:1])


@pytest.mark.parametrize(
    ("processes", "advice"),
    [
        (1, "on a CPU give --simulate 6"),
        (2, "on CPUs give each of the 2 processes 3 by --simulate, or launch local's --devices-per-process"),
        (4, "start another number of processes than 4"),
    ],
)
def test_the_advice_on_devices_is_for_the_number_of_processes(monkeypatch, processes, advice):
    """--simulate counts the devices of one process: the number for all of them would be wrong again."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(fsdp=3, tensor=2))
    assert str(error.value).endswith(f"; change the axes, or {advice}")


def test_all_axes_are_there_and_explicit():
    """Devices are counted along the axes in the order of AXES, the last fastest."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    assert dict(mesh.shape) == {"replica": 1, "stage": 1, "fsdp": 2, "expert": 1, "tensor": 1, "context": 4}
    assert mesh.axis_types == (AxisType.Explicit,) * 6
    assert mesh.devices[0, 0, 1, 0, 0].tolist() == jax.devices()[4:]
    assert single_device_mesh().axis_names == AXES
    assert single_device_mesh().size == 1


def test_sizes_below_one_are_named():
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(fsdp=0, tensor=-2))
    assert error.value.problems == ("mesh.fsdp = 0: must be at least 1", "mesh.tensor = -2: must be at least 1")


@pytest.mark.parametrize(
    ("sizes", "torus", "nearest"),
    [
        ({"fsdp": 32, "expert": 32}, (8, 8, 16), {"fsdp": 64, "expert": 16}),
        ({"fsdp": 8, "expert": 128, "tensor": 1}, (8, 8, 16), {"fsdp": 8, "expert": 128}),
        ({"fsdp": 2, "expert": 8}, (4, 4), {"fsdp": 4, "expert": 4}),
    ],
    ids=str,
)
def test_nearest_mesh_of_a_torus(sizes, torus, nearest):
    found = nearest_on_torus(sizes, torus)
    assert set(found) == set(nearest) and math.prod(found.values()) == math.prod(torus)
    distance = {name: sum(abs(math.log(each[a] / sizes[a])) for a in each) for name, each in
                (("found", found), ("nearest", nearest))}  # fmt: skip
    assert distance["found"] == pytest.approx(distance["nearest"])


def test_a_mesh_that_no_torus_has(monkeypatch):
    """As jax says it of 1,024 TPUs, here of two devices that stand beside each other."""

    class Device:
        coords, platform, slice_index, process_index, id = (1, 0, 0), "tpu", 0, 0, 0

    def refuse(*arguments, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(UserError, match="mesh.fsdp = 2: each must be a product .* 2 x 1 x 1, .*nearest: mesh.fsdp = 2"):
        make_mesh(MeshConfig(fsdp=2), [Device, Device])
