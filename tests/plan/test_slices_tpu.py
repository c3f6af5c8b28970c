"""Meshes and the training step of two TPU slices that are not here, compiled by libtpu: `make test-tpu`."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from k2jax.cli.main import main
from k2jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, TrainConfig
from k2jax.plan import aot
from k2jax.plan.topology import topology_devices, topology_mesh
from k2jax.sharding.names import AXES

pytestmark = pytest.mark.tpu

readable = pytest.mark.skipif(
    jax.version.__version_info__ < (0, 11), reason="jax 0.10.2 cannot read the programs of libtpu 0.0.52"
)

CONFIG = """
from k2jax.config import *

def config():
    return {config!r}
"""


def small(rows, **axes):
    """All sizes that XLA's TPU kernels tile: a few matrices of 128."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    return Config(
        model=ModelConfig(**sizes, n_routed_experts=16, num_experts_per_tok=6),
        data=DataConfig(sequence_length=256, batch_sequences=rows),
        kernels=KernelsConfig(expert_buffer=2.0),
        mesh=MeshConfig(**axes),
        train=TrainConfig(num_microbatches=2),
    )


def slice_of(device):
    return getattr(device, "slice_index", 0)  # those of a topology of one slice have none


def crossing_axes(mesh):
    """The axes with two neighbours of different slices, pair by pair."""
    found = set()
    for at in itertools.product(*map(range, mesh.devices.shape)):
        for dim, axis in enumerate(AXES):
            if at[dim]:
                before = mesh.devices[(*at[:dim], at[dim] - 1, *at[dim + 1 :])]
                if slice_of(before) != slice_of(mesh.devices[at]):
                    found.add(axis)
    return found


@pytest.mark.parametrize(
    ("topology", "axes", "crossed"),
    [
        ("2xv5p:4x4x4", {"replica": 2, "fsdp": 16, "expert": 4}, {"replica"}),
        ("2xv5p:4x4x4", {"replica": 2, "fsdp": 4, "expert": 4, "tensor": 4}, {"replica"}),
        ("2xv5p:4x4x4", {"stage": 2, "fsdp": 4, "expert": 16}, {"stage"}),
        ("4xv5p:4x4x4", {"replica": 2, "stage": 2, "fsdp": 64}, {"replica", "stage"}),
        ("2xv6e:4x4", {"replica": 2, "expert": 16}, {"replica"}),
        ("2xv5e:4x4", {"replica": 2, "fsdp": 2, "expert": 8}, {"replica"}),  # one whose dims jax splits
        ("2xtpu7x:2x2x2", {"replica": 2, "fsdp": 8, "expert": 2}, {"replica"}),
        ("v5p:4x4x4", {"fsdp": 16, "expert": 4}, set()),
    ],
)
def test_real_topologies(topology, axes, crossed):
    mesh = topology_mesh(MeshConfig(**axes), topology)
    assert mesh.axis_types == (AxisType.Explicit,) * 6
    assert len(set(mesh.devices.flat)) == mesh.size
    assert crossing_axes(mesh) == crossed


def kinds_between_slices(text):
    """By another reading than plan's: the handshakes of the hosts' runtime that a module has."""
    return set(re.findall(r'_xla_megascale_transfer_type="(\w+)"', text))


def largest_device(text):
    """Over all groups and pairs that a module's collectives list."""
    lists = re.findall(r"(?:replica_groups|source_target_pairs)=\{([{}\d,]+)\}", text)
    assert lists and "replica_groups=[" not in text and "replica_groups=mesh" not in text
    return max(int(number) for each in lists for number in re.findall(r"\d+", each))


@readable
def test_only_gradients_cross(tmp_path, monkeypatch, capsys):
    """Of the whole step on 2 x 64 chips: between slices nothing but all-reduces over `replica`, of the gradients' bytes
    for each microbatch and a few numbers; every other collective stays inside."""
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    texts = []
    read = aot.program_text
    monkeypatch.setattr(aot, "program_text", lambda compiled: texts.append(read(compiled)) or texts[-1])
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(config=small(256, replica=2, fsdp=16, expert=4)))
    assert main(["plan", str(file), "--topology", "2xv5p:4x4x4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n2xv5p:4x4x4: compiled in {found['compile_seconds']:.0f} s")
    assert (found["devices"], found["slices"]["replica"]) == (128, 2)
    assert found["hosts"][2] == "crosses the slow network between slices: replica 2"

    assert kinds_between_slices(texts[0]) == {"ALL_REDUCE"}
    assert largest_device(texts[0]) == 63
    rows = [row for row in found["communication"] if "between slices" in row["kind"]]
    assert {(row["kind"], *row["axes"]) for row in rows} == {("all-reduce between slices", "replica")}
    assert "replica" not in {a for row in found["communication"] if row not in rows for a in row["axes"]}
    sent, gradients = sum(row["bytes"] for row in rows), 2 * found["memory"]["gradients"]
    with capsys.disabled():
        print(f"between slices {sent:,} bytes a chip, gradients of two microbatches {gradients:,}")
    assert gradients / 2 < sent < 1.5 * gradients


@readable
def test_an_order_that_ignores_slices_is_found(capsys):
    """The same reading of a mesh whose `fsdp` goes over both slices: there gathers cross."""
    devices = sorted(topology_devices("2xv5p:2x2x2"), key=lambda device: (device.coords, device.slice_index))
    config = small(32, fsdp=4, expert=4)
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(1, 1, 4, 4, 1, 1)[:, :, [0, 2, 1, 3]], AXES, axis_types=(AxisType.Explicit,) * 6
    )
    lowered, _ = aot.lower_step(config, mesh)
    kinds = kinds_between_slices(aot.program_text(aot.compile_step(lowered)))
    with capsys.disabled():
        print(f"\nbetween slices: {kinds}")
    assert kinds - {"ALL_REDUCE"}


def test_a_mesh_that_would_cross(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(config=small(256, fsdp=32, expert=4)))
    assert main(["plan", str(file), "--topology", "2xv5p:4x4x4"]) == 2
    error = capsys.readouterr().err
    assert "mesh.replica = 1 * mesh.stage = 1: must be a multiple of the 2 slices" in error
    assert "nearest: mesh.replica = 2, mesh.fsdp = 16" in error
