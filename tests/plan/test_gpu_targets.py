"""GPUs that are not here: names, facts, messages, NVLink domains. Nothing is compiled."""

import importlib.metadata

import jax
import pytest

from k2jax.config import MeshConfig
from k2jax.errors import RunFailed
from k2jax.plan import gpu_targets, topology
from k2jax.plan.aot import check_fit
from k2jax.sharding import device_order


@pytest.mark.parametrize(
    ("name", "parts"), [("h100:16x8", (16, 1, 8)), ("h200:3x4", (3, 1, 4)), ("gb200:4x16x4", (4, 16, 4))]
)
def test_domains_hosts_and_gpus(name, parts):
    assert gpu_targets.read_name(name) == parts


def test_facts_as_text():
    text = gpu_targets.target_config(gpu_targets.GPU_TARGETS["gb200"])
    assert "cuda_compute_capability { major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES }" in text
    assert "device_memory_size: 197897748480\n" in text and 'platform_version: "Compute Capability 10.0a"' in text
    assert text.count("{") == text.count("}") and 'device_description_str: "NVIDIA GB200"\n' in text


def test_without_the_compiler(refusal, monkeypatch):
    versions = {}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = refusal(topology.topology_devices, "h100:1x8")
    assert message.count("pip install 'k2jax[gpu-compiler]'") == 2  # both parts at once
    versions |= {gpu_targets.PLUGIN: "0.0.1", gpu_targets.PTXAS: "13.0"}
    needed = jax.lib.__version__
    assert f"jax-cuda13-plugin 0.0.1: must be {needed}" in refusal(topology.topology_devices, "h100:1x8")


@pytest.mark.parametrize(("version", "is_there"), [((0, 10, 2), False), ((0, 11, 2), True)])
def test_a_field_that_an_older_xla_refuses(version, is_there, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    text = gpu_targets.target_config(gpu_targets.GPU_TARGETS["h100"])
    assert ("collective_memory_granularity: 2097152\n" in text) == is_there and text.count("{") == text.count("}")


def test_a_mesh_of_another_size(refusal, monkeypatch):
    monkeypatch.setattr(topology, "topology_devices", lambda name: [None] * 64)
    message = refusal(topology.topology_mesh, MeshConfig(fsdp=16, expert=64), "h100:8x8")
    assert message == (
        "mesh.fsdp = 16 * mesh.expert = 64: needs 1024 devices, --topology h100:8x8 has 64; "
        "nearest: mesh.fsdp = 1 or --topology h100:128x8"
    )
    message = refusal(topology.topology_mesh, MeshConfig(expert=32), "gb200:1x16x4")
    assert message.endswith("nearest: mesh.fsdp = 2")  # half a rack is another topology
    assert "nearest" not in refusal(topology.topology_mesh, MeshConfig(expert=3), "h100:8x8")


def test_what_xla_compiles_may_not_fit():
    memory = {"arguments": 30 * 2**30, "temp": 60 * 2**30, "outputs": 0, "program": 2**20, "total": 90 * 2**30 + 2**20}
    with pytest.raises(RunFailed, match=r"^does not fit: used 90.00G of 79.11G of NVIDIA H100 .*; exceeded by 10.89G$"):
        check_fit(memory, "NVIDIA H100 80GB HBM3")
    check_fit(memory, "NVIDIA H200 141GB HBM3e")
    check_fit(memory, "a device without a figure")


def test_domains_of_devices_that_all_have_the_same_slice(monkeypatch):
    """jax gives every GPU of a topology the slice 0: the mesh's outer axes would run through the domains."""

    class Gpu:
        platform, device_kind, slice_index, process_index = "gpu", "NVIDIA GB200", 0, 0

        def __init__(self, number):
            self.id = number

    devices = [Gpu(number) for number in range(12)]
    monkeypatch.setattr(device_order, "_DOMAIN_OF_ABSENT", {})
    assert [len(domain) for domain in device_order.fast_domains(devices)] == [12]
    device_order.enter_domains(devices, 4)
    assert [[d.id for d in domain] for domain in device_order.fast_domains(devices)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    ]  # fmt: skip
    sizes = {"replica": 1, "stage": 1, "fsdp": 6, "expert": 2, "tensor": 1, "context": 1}
    outer = device_order.domain_counts(sizes, device_order.fast_domains(devices))
    assert outer == {"replica": 1, "stage": 1, "fsdp": 3, "expert": 1, "tensor": 1, "context": 1}
    mesh = device_order.order_domains(sizes, outer, device_order.fast_domains(devices))
    assert [[d.id for d in row] for row in mesh.reshape(6, 2)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
