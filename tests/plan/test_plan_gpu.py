"""Training steps compiled for H100 that are not here: `make test-gpu`. K2 itself: benchmarks/k2_aot.py --topology."""

import json
import math
import re

import pytest

from k2jax.cli.main import main
from k2jax.cli.overrides import load_config
from k2jax.config import Config
from k2jax.plan.aot import (
    beyond_exchanges,
    check_fit,
    compile_step,
    expected_exchanges,
    memory_by_kind,
    part_of,
    step_collectives,
)
from k2jax.plan.topology import topology_mesh
from k2jax.sharding.compile_options import options_without_device
from k2jax.sharding.exchange import buffer_rows
from k2jax.train.compile_step import abstract_batch, lower_step

pytestmark = pytest.mark.gpu

TINY = {
    "mesh.fsdp": 2,
    "mesh.expert": 4,
    "kernels.expert_buffer": 2.0,
    "train.compute_dtype": "bfloat16",
    "train.num_microbatches": 2,
    "train.remat": "layer",
}
# Every width is K2's: a dense layer and two of 384 experts, over eight hosts.
K2_SLICE = {
    "model.num_hidden_layers": 3,
    "mesh.fsdp": 2,
    "mesh.expert": 32,
    "data.batch_sequences": 128,
    "train.num_microbatches": 2,
    "train.eval_sequences": 64,
}


def check_program(text: str, config: Config, mesh) -> None:
    """Promises of every step of several devices, read from its HLO."""
    collectives = step_collectives(text, mesh)
    reduced = [one for one in collectives if one.kind in ("all-reduce", "reduce-scatter")]
    assert reduced and not [one for one in reduced if re.search(r"\b(b?f16|f8\w*)\[", one.result)]

    shards, model = mesh.shape["expert"], config.model
    tokens = config.batch_tokens // config.train.num_microbatches // mesh.size
    rows = buffer_rows(tokens, model.num_experts_per_tok, model.n_routed_experts, shards, config.kernels.expert_buffer)
    assert f"[{rows}," in text
    assert f"[{model.n_routed_experts // shards},{rows}," not in text  # the rows once for each expert

    exchanges = [one for one in collectives if one.kind == "ragged-all-to-all"]
    assert {one.axes for one in exchanges} == {("expert",)}
    assert {part_of(one) for one in exchanges} == {"forward", "backward"}
    # In the experts' scope alone: weights that all share are cut along `expert` too, and gathered for every use.
    gathers = [one for one in collectives if one.kind == "all-gather" and "experts" in one.op_name]
    gathers = [one for one in gathers if "expert" in one.axes]
    assert gathers  # of the counts of rows
    exchanged = sum(one.runs * one.num_bytes for one in exchanges)
    assert sum(one.runs * one.num_bytes for one in gathers) < 0.1 * exchanged

    optimizer = [one for one in collectives if part_of(one) == "optimizer"]
    assert beyond_exchanges(optimizer, expected_exchanges(config, mesh.shape)) == []


@pytest.mark.parametrize(
    ("file", "values", "topology"),
    [("configs/tiny.py", TINY, "h100:1x8"), ("configs/k2_1t.py", K2_SLICE, "h100:8x8")],
    ids=["tiny", "k2-slice"],
)
def test_a_step_for_h100(file, values, topology, capsys):
    config = load_config(file).replace(values).validate()
    mesh = topology_mesh(config.mesh, topology)
    lowered, state = lower_step(config, mesh)
    compiled = compile_step(lowered, options_without_device(mesh))
    memory = memory_by_kind(state, abstract_batch(config, mesh), compiled)
    with capsys.disabled():
        print(f"\n{file} on {topology}: {memory['total'] / 2**30:.2f} GiB a device, {memory['temp'] / 2**30:.2f} temp")
    check_fit(memory, mesh.devices.flat[0].device_kind)
    assert memory["total"] > memory["arguments"] + memory["temp"] > memory["parameters"] > 0
    check_program(compiled.as_text(), config, mesh)


def test_the_mesh_of_two_racks():
    """Experts stay inside the NVLink domain, whose GPUs are those of 16 hosts."""
    config = load_config("configs/tiny.py").replace({"mesh.fsdp": 2, "mesh.expert": 64})
    mesh = topology_mesh(config.mesh, "gb200:2x16x4")
    assert math.prod(mesh.devices.shape) == 128
    hosts = [{device.process_index for device in mesh.devices[0, 0, fsdp].flat} for fsdp in range(2)]
    assert hosts == [set(range(16)), set(range(16, 32))]


def test_an_option_that_xla_has_not(monkeypatch, capsys):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    small = ["--model.num-hidden-layers", "1", "--kernels.compiler-options", "xla_gpu_no_such_option=1"]
    assert main(["plan", "configs/tiny.py", "--topology", "h100:1x1", *small]) == 2
    assert "kernels.compiler_options: XLA refuses one" in capsys.readouterr().err


def test_json_of_a_plan(monkeypatch, capsys):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    small = ["--model.num-hidden-layers", "1", "--model.first-k-dense-replace", "1", "--mesh.fsdp", "2"]
    assert main(["plan", "configs/tiny.py", "--topology", "h200:2x1", "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["memory_of_device"]) == (2, 151_397_597_184)
    assert found["slices"]["fsdp"] == 2 and found["optimizer_beyond_exchanges"] == []
