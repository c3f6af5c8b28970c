"""A mesh of accelerators that are not here, by the name of their topology: libtpu compiles for TPUs on any machine."""

import difflib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from k2jax.config import MeshConfig
from k2jax.errors import UserError
from k2jax.plan.gpu_targets import GPU_TARGETS, form, gpu_devices, is_gpu
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.names import AXES

# libtpu's names, with the chips' dims: 2 of a torus in a plane, 3 in space.
GENERATIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
# Memory of one device, by jax's name of its kind; libtpu's own limit is a little below (it keeps some for itself).
MEMORY_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 96}
MEMORY_BYTES = {kind: gib * 2**30 for kind, gib in MEMORY_GIB.items()}
MEMORY_BYTES |= {target.device_kind: target.memory_bytes for target in GPU_TARGETS.values()}
# What libtpu reads so as not to look for the machine that it is told to compile for.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _cube(num_chips: int, num_dims: int) -> str:
    """The dims, small ones first, of the most even torus of so many chips: 1024 -> 8x8x16."""
    if num_dims == 1:
        return str(num_chips)
    side = max(d for d in range(1, int(num_chips ** (1 / num_dims) + 1e-9) + 1) if num_chips % d == 0)
    return f"{side}x{_cube(num_chips // side, num_dims - 1)}"


def split_name(name: str) -> tuple[int, str]:
    """Number of slices and the topology of each: 2xv5p:4x4x4 -> 2, v5p:4x4x4; v5p:4x4x4 -> 1, itself."""
    match = re.match(r"([1-9]\d*)x(?=[a-z])", name)
    return (int(match[1]), name[match.end() :]) if match else (1, name)


def join_name(num_slices: int, slice_name: str) -> str:
    """The inverse of `split_name`."""
    return f"{num_slices}x{slice_name}" if num_slices > 1 else slice_name


def _check_name(name: str) -> None:
    """Raises UserError for what is not the name of a topology."""
    num_slices, slice_name = split_name(name)
    generation, _, dims = slice_name.partition(":")
    problem = f"--topology {name}: must be GENERATION:AxBxC, or NxGENERATION:AxBxC for N slices,"
    if generation not in GENERATIONS:
        near = difflib.get_close_matches(generation, [*GENERATIONS, *GPU_TARGETS], n=1, cutoff=0.5)
        gpus = " or ".join(map(form, GPU_TARGETS))
        raise UserError(
            f"{problem} with one of {', '.join(GENERATIONS)}, or {gpus}" + "; nearest: " * bool(near) + "".join(near)
        )
    count = GENERATIONS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) or len(dims.split("x")) != count:
        numbers = [max(int(n), 1) for n in re.findall(r"\d+", dims)]
        near = _cube(math.prod(numbers), count) if numbers else "x".join(["4"] * count)
        near = join_name(num_slices, f"{generation}:{near}")
        raise UserError(f"{problem} {count} numbers for {generation}; nearest: {near}")


def topology_devices(name: str) -> list:
    """The devices of a topology such as v5p:8x8x16, of two slices 2xv5p:8x8x16, or of GPUs h100:16x8; to compile alone.

    Raises UserError for a name that the compiler does not know, and where it is not installed.
    """
    if is_gpu(name):
        return gpu_devices(name)
    _check_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which compiles for TPUs, is not installed: pip install 'k2jax[tpu-compiler]'")
    for key, value in NO_TPU_HERE.items():
        os.environ.setdefault(key, value)
    num_slices, slice_name = split_name(name)
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {name}: libtpu refuses it: {str(error).splitlines()[0]}") from None


def _nearest_tpus(sizes: dict[str, int], name: str, num_devices: int) -> list[str]:
    """Changes of a mesh or of a topology of TPUs by which their numbers of devices agree."""
    needed = math.prod(sizes.values())
    num_slices, slice_name = split_name(name)
    generation, dims = slice_name.split(":")
    of_slice = num_devices // num_slices
    of_chip = of_slice // math.prod(int(d) for d in dims.split("x"))
    axis = "replica" if num_slices > 1 else "fsdp"
    fitting, rest = divmod(num_devices, needed // sizes[axis])
    near = []
    if not rest and (axis == "fsdp" or fitting * sizes["stage"] % num_slices == 0):
        near.append(f"mesh.{axis} = {fitting}")
    if num_slices > 1 and needed % of_slice == 0:
        near.append(f"--topology {join_name(needed // of_slice, slice_name)}")
    elif needed % (of_chip * num_slices) == 0:
        cube = _cube(needed // (of_chip * num_slices), GENERATIONS[generation])
        near.append(f"--topology {join_name(num_slices, f'{generation}:{cube}')}")
    return near


def _nearest_gpus(sizes: dict[str, int], name: str, num_devices: int) -> list[str]:
    """The same for GPUs, of which a mesh may have any number of NVLink domains, as the given one has them."""
    needed = math.prod(sizes.values())
    fitting, rest = divmod(num_devices, needed // sizes["fsdp"])
    near = [] if rest else [f"mesh.fsdp = {fitting}"]
    generation, _, dims = name.partition(":")
    num_domains, *inner = dims.split("x")
    domains, rest = divmod(needed, num_devices // int(num_domains))
    return near if rest else [*near, f"--topology {generation}:{'x'.join([str(domains), *inner])}"]


def _mismatch(config: MeshConfig, name: str, num_devices: int) -> str:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    product = " * ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items() if size > 1)
    near = (_nearest_gpus if is_gpu(name) else _nearest_tpus)(sizes, name, num_devices)
    nearest = "; nearest: " * bool(near) + " or ".join(near)
    return (
        f"{product or 'the mesh (all axes 1)'}: needs {math.prod(sizes.values())} devices, "
        f"--topology {name} has {num_devices}{nearest}"
    )


def topology_mesh(config: MeshConfig, name: str) -> jax.sharding.Mesh:
    """The mesh of a config over a topology, laid out as on the machine itself.

    Raises UserError as `topology_devices` does, and for a mesh of another number of devices.
    """
    devices = topology_devices(name)
    if math.prod(getattr(config, axis) for axis in AXES) != len(devices):
        raise UserError(_mismatch(config, name, len(devices)))
    return make_mesh(config, devices)
