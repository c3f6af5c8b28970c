"""NVIDIA GPUs that are not here: facts from which XLA:GPU compiles for them, without a driver or a CUDA library.

The compiler is jax's CUDA plugin, with ptxas and libdevice of nvidia-cuda-nvcc: the extra [gpu-compiler] brings both.
"""

import importlib.metadata
import math
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from k2jax.errors import UserError
from k2jax.sharding.device_order import enter_domains


class GpuTarget(NamedTuple):
    """A GPU in the machine that it is sold in. The domain is that of NVLink: hosts whose GPUs it joins."""

    device_kind: str  # as CUDA names it
    capability: str  # CUDA's compute capability; the programs use its accelerated features, "a"
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_bytes: int
    bytes_per_second: int  # of its memory
    memory_bytes: int  # as CUDA reports it, a little less than what is sold; XLA schedules to 0.8 of it
    hosts_per_domain: int
    gpus_per_host: int


# Of H100 SXM, H200 SXM and GB200 NVL72, as XLA describes such devices; not checked against data sheets or hardware.
GPU_TARGETS = {
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", "9.0", 132, 1.98, 52_428_800, 3_352_320_000_000, 84_942_979_072, 1, 8),
    "h200": GpuTarget(
        "NVIDIA H200 141GB HBM3e", "9.0", 132, 1.98, 52_428_800, 4_800_000_000_000, 151_397_597_184, 1, 8
    ),
    "gb200": GpuTarget("NVIDIA GB200", "10.0", 152, 2.062, 135_528_448, 7_928_064_000_000, 197_897_748_480, 18, 4),
}
PLUGIN, PTXAS = "jax-cuda13-plugin", "nvidia-cuda-nvcc"
# Alike for all of them: CUDA's limits of Hopper and Blackwell, and the libraries of CUDA 13.
_TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bytes_per_second}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {capability}a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "{device_kind}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  cub_version: "3.1.2"
  device_interconnect_info {{ active_links: 18 }}{newer}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device_kind}"
"""
_SINCE_JAX_0_11 = "\n  collective_memory_granularity: 2097152"  # an older XLA refuses a field that it does not know


def target_config(target: GpuTarget) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = target.capability.split(".")
    newer = _SINCE_JAX_0_11 if jax.__version_info__ >= (0, 11) else ""
    return _TARGET_CONFIG.format(major=major, minor=minor, newer=newer, **target._asdict())


def is_gpu(name: str) -> bool:
    """True if a topology's name is that of GPUs: h100:16x8."""
    return name.partition(":")[0] in GPU_TARGETS


def form(generation: str) -> str:
    """The form of the names of a GPU's topologies: h100:HOSTSx8, gb200:RACKSx18x4."""
    target = GPU_TARGETS[generation]
    hosts = "HOSTS" if target.hosts_per_domain == 1 else f"RACKSx{target.hosts_per_domain}"
    return f"{generation}:{hosts}x{target.gpus_per_host}"


def nearest_name(generation: str, num_devices: int) -> str:
    """The topology of whole domains with the fewest devices that has at least so many."""
    target = GPU_TARGETS[generation]
    hosts, gpus = target.hosts_per_domain, target.gpus_per_host
    domains = max(-(-num_devices // (hosts * gpus)), 1)
    return f"{generation}:{domains}x{gpus}" if hosts == 1 else f"{generation}:{domains}x{hosts}x{gpus}"


def read_name(name: str) -> tuple[int, int, int]:
    """(domains, hosts of each, GPUs of each host). Raises UserError for what is not the name of a topology of GPUs.

    Of a rack fewer hosts, and of a host fewer GPUs, may be used: gb200:2x16x4 has 64 GPUs in each of two racks.
    """
    generation, _, dims = name.partition(":")
    target = GPU_TARGETS[generation]
    numbers = [int(n) for n in re.findall(r"\d+", dims)]
    is_rack = target.hosts_per_domain > 1
    limits = (target.hosts_per_domain, target.gpus_per_host) if is_rack else (target.gpus_per_host,)
    inner = numbers[1:]
    right = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) and len(inner) == len(limits)
    if not right or any(n > limit for n, limit in zip(inner, limits, strict=True)):
        most = f"at most {' x '.join(map(str, limits))} in {'a rack' if is_rack else 'a host'}"
        near = nearest_name(generation, math.prod(max(n, 1) for n in numbers) if len(numbers) > 1 else 1)
        raise UserError(f"--topology {name}: must be {form(generation)}, {most}; nearest: {near}")
    return (numbers[0], *inner) if is_rack else (numbers[0], 1, inner[0])


def _check_compiler() -> None:
    """Raises UserError for each part of the compiler that is missing or does not go with this jax."""
    problems = []
    for package in (PLUGIN, PTXAS):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{package}, which compiles for GPUs, is not installed: pip install 'k2jax[gpu-compiler]'")
            continue
        if package == PLUGIN and version != jax.lib.__version__:
            problems.append(
                f"{package} {version}: must be {jax.lib.__version__}, as jaxlib is: pip install {package}=={jax.lib.__version__}"
            )
    if problems:
        raise UserError(*problems)


def gpu_devices(name: str) -> list:
    """The devices of a topology such as h100:16x8 or gb200:4x18x4, for compiling alone, with their domains.

    Raises UserError for a name that is none, and where the compiler is not installed.
    """
    domains, hosts, gpus = read_name(name)
    _check_compiler()
    target = GPU_TARGETS[name.partition(":")[0]]
    options = {"target_config": target_config(target), "topology": f"{domains}x{hosts}x{gpus}"}
    try:
        devices = list(topologies.get_topology_desc(platform="cuda", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {name}: XLA refuses it: {str(error).splitlines()[0]}") from None
    enter_domains(devices, hosts * gpus)
    return devices
