"""Messages for topologies that do not exist, do not fit, or cannot be compiled for. Nothing is compiled."""

import importlib.util

import pytest

from k2jax.cli.main import main
from k2jax.config import MeshConfig
from k2jax.plan import topology


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5p:8x128", "v5p:8x8x16"),
        ("v6e:4x4x4", "v6e:8x8"),
        ("v5p", "v5p:4x4x4"),
        ("v5:8x8", "v5"),
        ("v6e:4x", "v6e:2x2"),
        ("2xv5p:4x4", "2xv5p:2x2x4"),
        ("2xv5q:4x4x4", "v5p"),
        ("0xv5p:4x4x4", "v5p"),
        ("2x2xv5p:4x4x4", "v5p"),
        ("h100:16", "h100:1x8"),
        ("h100:2x16", "h100:4x8"),
        ("h200:0x8", "h200:1x8"),
        ("h100:4x1x8", "h100:4x8"),
        ("gb200:8x4", "gb200:1x18x4"),
        ("gb200:2x36x4", "gb200:4x18x4"),
        ("gb200:x18x4", "gb200:1x18x4"),
        ("h101:2x8", "h100"),
        ("2xh100:2x8", "h100"),
    ],
)
def test_a_wrong_name(refusal, name, near):
    message = refusal(topology.topology_devices, name)
    assert message.startswith(f"--topology {name}: must be") and f"nearest: {near}" in message


def test_without_libtpu(refusal, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'k2jax[tpu-compiler]'" in refusal(topology.topology_devices, "v5p:2x2x1")


def test_a_mesh_of_another_size(refusal, monkeypatch):
    monkeypatch.setattr(topology, "topology_devices", lambda name: [None] * 64)
    message = refusal(topology.topology_mesh, MeshConfig(fsdp=16, expert=64), "v5p:4x4x4")
    assert message == (
        "mesh.fsdp = 16 * mesh.expert = 64: needs 1024 devices, --topology v5p:4x4x4 has 64; "
        "nearest: mesh.fsdp = 1 or --topology v5p:8x8x16"
    )
    message = refusal(topology.topology_mesh, MeshConfig(expert=3), "v5p:4x4x4")
    assert "--topology v5p:1x1x3" in message and "mesh.fsdp" not in message


def test_a_mesh_of_another_size_than_two_slices(refusal, monkeypatch):
    monkeypatch.setattr(topology, "topology_devices", lambda name: [None] * 128)
    message = refusal(topology.topology_mesh, MeshConfig(replica=4, expert=64), "2xv5p:4x4x4")
    assert message == (
        "mesh.replica = 4 * mesh.expert = 64: needs 256 devices, --topology 2xv5p:4x4x4 has 128; "
        "nearest: mesh.replica = 2 or --topology 4xv5p:4x4x4"
    )
    message = refusal(topology.topology_mesh, MeshConfig(replica=2, fsdp=16), "2xv5p:4x4x4")
    assert message.endswith("nearest: mesh.replica = 8 or --topology 2xv5p:2x2x4")
    message = refusal(topology.topology_mesh, MeshConfig(expert=64), "2xv5p:4x4x4")
    assert message.endswith("nearest: mesh.replica = 2 or --topology v5p:4x4x4")
    message = refusal(topology.topology_mesh, MeshConfig(replica=2, expert=128), "2xv5p:4x4x4")
    assert message.endswith("nearest: --topology 4xv5p:4x4x4")  # one replica would cross
    assert "nearest" not in refusal(topology.topology_mesh, MeshConfig(expert=3), "2xv5p:4x4x4")


@pytest.mark.parametrize(("name", "parts"), [("v5p:4x4x4", (1, "v5p:4x4x4")), ("12xv6e:4x4", (12, "v6e:4x4"))])
def test_names_of_several_slices(name, parts):
    assert topology.split_name(name) == parts and topology.join_name(*parts) == name


def test_the_command_says_it_all_at_once(capsys, monkeypatch):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    assert main(["plan", "configs/tiny.py", "--topology", "v5q:2x2"]) == 2
    error = capsys.readouterr().err
    assert "v5p" in error and "Traceback" not in error
