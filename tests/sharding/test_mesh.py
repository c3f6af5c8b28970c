"""The mesh and what is said when it does not fit."""

import jax
import pytest
from jax.sharding import AxisType

from k2jax.config import MeshConfig, UserError
from k2jax.sharding.mesh import make_mesh, single_device_mesh
from k2jax.sharding.names import AXES


def test_wrong_number_of_devices_names_the_axes_and_both_numbers():
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(fsdp=3, tensor=2))
    assert str(error.value) == (
        "mesh.fsdp = 3 * mesh.tensor = 2: needs 6 devices, there are 8; change the axes, or on a CPU give --simulate 6"
    )
    with pytest.raises(UserError, match="^the mesh \\(all axes 1\\): needs 1 devices, there are 8; "):
        make_mesh(MeshConfig())


def test_all_axes_are_there_and_explicit():
    """Devices are counted along the axes in the order of AXES, the last fastest."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 2, "expert": 1, "tensor": 1, "context": 4}
    assert mesh.axis_types == (AxisType.Explicit,) * 5
    assert mesh.devices[0, 1, 0, 0].tolist() == jax.devices()[4:]
    assert single_device_mesh().axis_names == AXES
    assert single_device_mesh().size == 1


def test_sizes_below_one_are_named():
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(fsdp=0, tensor=-2))
    assert error.value.problems == ("mesh.fsdp = 0: must be at least 1", "mesh.tensor = -2: must be at least 1")
