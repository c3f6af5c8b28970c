"""Meshes over slices, hosts and NVLink domains that are not here: simulated devices, and counts of what crosses."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from k2jax.config import MeshConfig
from k2jax.errors import UserError
from k2jax.sharding import mesh as mesh_module
from k2jax.sharding.device_order import nearest_mesh, outer_sizes
from k2jax.sharding.host_picture import MAX_ROWS, picture_hosts
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.names import AXES

CHIPS_PER_HOST = 4  # of a TPU: 2 x 2 x 1 of the torus


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    slice_index: int | None
    platform: str
    device_kind: str = "simulated"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


class FakeMesh:
    """The part of a Mesh that is read here; jax's own takes real devices alone."""

    def __init__(self, devices, names, axis_types):
        self.devices, self.axis_names, self.axis_types = devices, names, axis_types
        self.shape = dict(zip(names, devices.shape, strict=True))


@pytest.fixture(autouse=True)
def meshes_of_simulated_devices(monkeypatch):
    from jax._src import sharding_impls

    monkeypatch.setattr(mesh_module.jax.sharding, "Mesh", FakeMesh)
    monkeypatch.setattr(sharding_impls, "Mesh", lambda devices, names, axis_types: FakeMesh(devices, names, axis_types))


def tpu_slices(num_slices, torus, kind="TPU v4"):
    """Chips; a process for each 2 x 2 x 1 of them."""
    x, y, z = torus
    devices = []
    for s in range(num_slices):
        for number, (k, j, i) in enumerate(itertools.product(range(z), range(y), range(x))):
            host = (k * (y // 2) + j // 2) * (x // 2) + i // 2
            process = s * (x * y * z // CHIPS_PER_HOST) + host
            devices.append(Device((s + 1) * 100_000 + number, process, s, "tpu", kind, (i, j, k)))
    return devices


def gpu_hosts(num_hosts, per_host=8, hosts_per_domain=1, with_slices=True, processes_per_host=1):
    """Hosts of GPUs; a slice is an NVLink domain of hosts, as jax numbers them."""
    return [
        Device(
            host * per_host + k,
            (host * per_host + k) // (per_host // processes_per_host),
            host // hosts_per_domain if with_slices else None,
            "gpu",
            "NVIDIA H100 80GB HBM3",
        )
        for host in range(num_hosts)
        for k in range(per_host)
    ]


def cpu_processes(num_processes, per_process):
    return [Device(2048 * p + k, p, 0, "cpu", "cpu") for p in range(num_processes) for k in range(per_process)]


def neighbours_that_cross(mesh, number_of):
    """By axis: pairs of neighbours along it with different numbers, of all pairs; counted one by one."""
    found = {}
    for dim, axis in enumerate(AXES):
        pairs = [
            (mesh.devices[at], mesh.devices[(*at[:dim], at[dim] + 1, *at[dim + 1 :])])
            for at in itertools.product(*map(range, mesh.devices.shape))
            if at[dim] + 1 < mesh.devices.shape[dim]
        ]
        found[axis] = sum(number_of(a) != number_of(b) for a, b in pairs), len(pairs)
    return found


def crossing(mesh, number_of):
    return {axis for axis, (count, _) in neighbours_that_cross(mesh, number_of).items() if count}


def domain(device):
    return device.process_index if device.slice_index is None else device.slice_index


TOPOLOGIES = {
    "2 slices 4x4x4": (tpu_slices(2, (4, 4, 4)), ("replica", "stage")),
    "4 slices 4x4x4": (tpu_slices(4, (4, 4, 4)), ("replica", "stage")),
    "4 slices 2x2x4": (tpu_slices(4, (2, 2, 4)), ("replica", "stage")),
    "2 hosts of 8 GPUs": (gpu_hosts(2), ("replica", "stage", "fsdp", "expert")),
    "4 hosts of 8 GPUs": (gpu_hosts(4), ("replica", "stage", "fsdp", "expert")),
    "4 hosts, no slices": (gpu_hosts(4, with_slices=False), ("replica", "stage", "fsdp", "expert")),
    "2 racks of 4 hosts": (gpu_hosts(8, 4, 4), ("replica", "stage", "fsdp", "expert")),
    "2 hosts, a process per GPU": (gpu_hosts(2, processes_per_host=8), ("replica", "stage", "fsdp", "expert")),
}
MESHES = [
    {"replica": 2}, {"replica": 4}, {"stage": 2}, {"stage": 4}, {"replica": 2, "stage": 2}, {"replica": 8},
    {"replica": 1},
    {"replica": 2, "expert": 4}, {"replica": 2, "tensor": 2}, {"replica": 4, "tensor": 4, "context": 2}, {"tensor": 4},
    {"stage": 4, "context": 4}, {"expert": 4}, {"tensor": 16}, {"expert": 16, "context": 2}, {"context": 16},
]  # fmt: skip
GRID = [
    pytest.param(name, sizes | {"fsdp": len(devices) // math.prod(sizes.values())}, id=f"{name}-{sizes}")
    for (name, (devices, _)), sizes in itertools.product(TOPOLOGIES.items(), MESHES)
    if len(devices) % math.prod(sizes.values()) == 0
]


@pytest.mark.parametrize(("name", "sizes"), GRID)
def test_what_crosses(name, sizes):
    """A mesh is refused, or has all devices once and only allowed axes cross, whatever the order of the devices."""
    devices, allowed = TOPOLOGIES[name]
    number = len({domain(d) for d in devices})
    config = MeshConfig(**sizes)
    fits = math.prod(getattr(config, axis) for axis in allowed) % number == 0
    try:
        mesh = make_mesh(config, devices)
    except UserError as error:
        if fits:
            assert devices[0].platform == "tpu" and "of the torus" in str(error), error
        else:
            assert f"must be a multiple of the {number} " in str(error) and "; nearest: mesh." in str(error)
        return
    assert fits
    assert mesh.devices.shape == tuple(getattr(config, axis) for axis in AXES) and mesh.axis_names == AXES
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    assert crossing(mesh, domain) <= set(allowed)
    shuffled = random.Random(0).sample(devices, len(devices))
    assert (make_mesh(config, shuffled).devices == mesh.devices).all()
    # the first of the allowed axes take what they can: nothing crosses beside them
    left = number
    for axis in allowed:
        factor = math.gcd(getattr(config, axis), left)
        count, pairs = neighbours_that_cross(mesh, domain)[axis]
        size = getattr(config, axis)
        assert count * (size - 1) == pairs * (factor - 1), f"{axis}: {count} of {pairs} pairs cross"
        left //= factor


def test_every_case_is_met():
    """Of the grid above: meshes that cross by each allowed axis, and refusals, on TPUs and GPUs."""
    met = set()
    for name, sizes in (case.values for case in GRID):
        devices = TOPOLOGIES[name][0]
        try:
            axes = crossing(make_mesh(MeshConfig(**sizes), devices), domain)
            met |= {(devices[0].platform, axis) for axis in axes}
        except UserError as error:
            met.add((devices[0].platform, "torus" if "of the torus" in str(error) else "refused"))
    assert met >= {("tpu", "replica"), ("tpu", "stage"), ("tpu", "refused"), ("tpu", "torus"), ("gpu", "refused")}
    assert met >= {("gpu", axis) for axis in ("replica", "stage", "fsdp", "expert")}


def refusal(sizes, devices):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(**sizes), devices)
    return str(error.value)


def test_an_axis_that_would_cross_between_slices():
    assert refusal({"fsdp": 8}, tpu_slices(2, (2, 2, 1))) == (
        "mesh.replica = 1 * mesh.stage = 1: must be a multiple of the 2 slices, or fsdp, expert, tensor, context would "
        "cross the slow network between them; nearest: mesh.replica = 2, mesh.fsdp = 4"
    )
    message = refusal({"replica": 2, "expert": 128}, tpu_slices(4, (4, 4, 4)))
    assert message.endswith("nearest: mesh.replica = 4, mesh.expert = 64")


def test_the_nearest_mesh_fits_the_torus():
    """replica 2, fsdp 8, expert 8 would be as near, but no dims of 4 x 4 x 4 make 8."""
    message = refusal({"fsdp": 16, "expert": 8}, tpu_slices(2, (4, 4, 4)))
    near = dict(part.removeprefix("mesh.").split(" = ") for part in message.split("nearest: ")[1].split(", "))
    sizes = {"fsdp": 16, "expert": 8} | {axis: int(size) for axis, size in near.items()}
    mesh = make_mesh(MeshConfig(**sizes), tpu_slices(2, (4, 4, 4)))
    assert crossing(mesh, domain) <= {"replica", "stage"}


def test_a_torus_of_several_slices_names_the_whole_mesh():
    message = refusal({"replica": 2, "fsdp": 8, "expert": 8}, tpu_slices(2, (4, 4, 4)))
    assert "its factor inside a slice must be a product of some of the dims of the torus, 4 x 4 x 4" in message
    near = dict(part.removeprefix("mesh.").split(" = ") for part in message.split("nearest: ")[1].split(", "))
    make_mesh(MeshConfig(**{axis: int(size) for axis, size in near.items()}), tpu_slices(2, (4, 4, 4)))
    assert near["replica"] == "2"  # which is not of the torus


def test_dims_that_jax_splits_in_one_slice_it_splits_in_two():
    """A torus of 4 x 4: v5e's dims may be shared between axes, as jax.make_mesh has it."""
    sizes = {"fsdp": 2, "expert": 8}
    make_mesh(MeshConfig(**sizes), tpu_slices(1, (4, 4, 1), "TPU v5 lite"))
    mesh = make_mesh(MeshConfig(replica=2, **sizes), tpu_slices(2, (4, 4, 1), "TPU v5 lite"))
    assert crossing(mesh, domain) == {"replica"}
    assert "of the torus, 4 x 4 x 1" in refusal({"replica": 2, **sizes}, tpu_slices(2, (4, 4, 1)))


def test_tpus_without_slices_are_one():
    """As those of a topology of one slice, compiled for: hosts of it are no domains."""
    devices = [dataclasses.replace(device, slice_index=None) for device in tpu_slices(1, (2, 2, 2))]
    assert crossing(make_mesh(MeshConfig(tensor=8), devices), lambda d: d.process_index) == {"tensor"}


def test_gpus_refuse_tensor_and_context_between_hosts():
    message = refusal({"tensor": 16}, gpu_hosts(2))
    assert message == (
        "mesh.replica = 1 * mesh.stage = 1 * mesh.fsdp = 1 * mesh.expert = 1: must be a multiple of the 2 NVLink "
        "domains, or tensor, context would cross the slow network between them; "
        "nearest: mesh.fsdp = 2, mesh.tensor = 8. "
        "Hosts whose GPUs one NVLink domain joins count as one if JAX_PARTITION_INDEX is the same on them"
    )
    assert crossing(make_mesh(MeshConfig(tensor=16), gpu_hosts(4, 4, 4)), lambda d: d.process_index) == {"tensor"}


def test_domains_of_different_sizes():
    devices = gpu_hosts(2)
    assert refusal({"fsdp": 12}, devices[:12]) == (
        "NVLink domain 1: has 4 devices, NVLink domain 0 has 8; all must have as many"
    )


@pytest.mark.parametrize("number", [2, 4])
def test_cpu_processes_keep_innermost_axes_inside(number):
    """In the order of processes, which jax's own order is: the inner axes are inside as far as the devices go."""
    devices = cpu_processes(number, 8 // number)
    config = MeshConfig(fsdp=2, expert=2, tensor=2)
    mesh = make_mesh(config, random.Random(1).sample(devices, 8))
    assert [d.id for d in mesh.devices.flat] == [d.id for d in devices]
    assert crossing(mesh, lambda d: d.process_index) == {2: {"fsdp"}, 4: {"fsdp", "expert"}}[number]


def test_outer_sizes_take_the_first_axis_first():
    sizes = dict.fromkeys(AXES, 1) | {"replica": 4, "stage": 6}
    assert outer_sizes(sizes, 6, ("replica", "stage")) == dict.fromkeys(AXES, 1) | {"replica": 2, "stage": 3}
    assert outer_sizes(sizes, 16, ("replica", "stage")) is None


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"tensor": 2, "expert": 4}, {"context": 8}, {"fsdp": 5, "tensor": 4}], ids=str
)
def test_nearest_mesh_is_the_nearest(sizes):
    """Against all meshes of as many devices, listed by another loop."""
    sizes = dict.fromkeys(AXES, 1) | sizes
    total = math.prod(sizes.values())
    domains = [gpu_hosts(2, total // 2)[: total // 2], gpu_hosts(2, total // 2)[total // 2 :]]
    domains = [[Device(d.id, d.process_index, d.slice_index, "cpu") for d in each] for each in domains]

    def distance(mesh):
        return sum(abs(math.log(new / old)) for new, old in zip(mesh, sizes.values(), strict=True))

    divisors = [d for d in range(1, total + 1) if total % d == 0]
    every = [m for m in itertools.product(divisors, repeat=6) if math.prod(m) == total and m[0] * m[1] % 2 == 0]
    found = tuple(nearest_mesh(sizes, domains).values())
    assert found in every and distance(found) == pytest.approx(min(map(distance, every)))


def test_one_process_has_no_picture():
    assert picture_hosts(make_mesh(MeshConfig(fsdp=8), cpu_processes(1, 8))) == []


def test_picture_of_processes():
    assert picture_hosts(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), cpu_processes(2, 4))) == [
        "process 0  fsdp 0  expert 0-1  tensor 0-1",
        "process 1  fsdp 1  expert 0-1  tensor 0-1",
        "crosses processes: fsdp 2",
    ]


def test_picture_of_slices():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=4, expert=2, tensor=2), tpu_slices(2, (2, 2, 4)))
    assert picture_hosts(mesh)[:3] == [
        "slice 0  replica 0  fsdp 0-3  expert 0-1  tensor 0-1",
        "slice 1  replica 1  fsdp 0-3  expert 0-1  tensor 0-1",
        "crosses the slow network between slices: replica 2",
    ]
    hosts = crossing(mesh, lambda d: d.process_index)
    assert picture_hosts(mesh)[3:] == ["crosses processes: " + ", ".join(
        f"{axis} {size}" for axis, size in mesh.shape.items() if axis in hosts)]  # fmt: skip


def test_picture_says_that_experts_cross():
    lines = picture_hosts(make_mesh(MeshConfig(expert=32, tensor=2), gpu_hosts(8)))
    assert lines[-1] == "crosses the slow network between NVLink domains: expert 32"
    assert lines[1] == "NVLink domain 1  expert 4-7  tensor 0-1"


@pytest.mark.parametrize("number", [2, MAX_ROWS, MAX_ROWS + 1, 1000])
def test_picture_is_small(number):
    lines = picture_hosts(make_mesh(MeshConfig(replica=number, tensor=8), gpu_hosts(number, processes_per_host=8)))
    assert len(lines) <= 11
    shown = [line for line in lines if line.startswith("NVLink domain")]
    left_out = next((int(line.split()[1]) for line in lines if line.startswith("...")), 0)
    assert len(shown) + left_out == number and f"replica {number - 1} " in shown[-1]


def test_picture_of_scattered_coordinates():
    """A process that has every other place of an axis, and one with more than three ranges."""
    devices = np.array([Device(k, k % 2, 0, "cpu") for k in range(12)], object).reshape(1, 1, 12, 1, 1, 1)
    assert picture_hosts(FakeMesh(devices, AXES, None))[0] == "process 0  fsdp 0..10 (6 of them)"
    assert picture_hosts(FakeMesh(devices[:, :, :6], AXES, None))[0] == "process 0  fsdp 0,2,4"
