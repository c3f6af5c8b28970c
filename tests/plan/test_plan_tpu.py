"""`k2jax plan` with libtpu, for a slice that is not here: `make test-tpu`. K2 itself: benchmarks/k2_aot.py."""

import json
import time

import pytest

from k2jax.cli.main import main

pytestmark = pytest.mark.tpu

CONFIG = """
from k2jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, TrainConfig

def config():
    return Config(
        model=ModelConfig(**{model}),
        data=DataConfig(sequence_length=256, batch_sequences=16),
        kernels=KernelsConfig(expert_buffer=2.0),
        mesh=MeshConfig(fsdp=2, expert=4),
        train=TrainConfig(num_microbatches=2),
    )
"""


# Open: in this small model XLA joins an array of two dims to the optimizer's norms, which K2's own step has not.
@pytest.mark.xfail(reason="an all-reduce under the optimizer's name has an array of two dims", strict=True)
@pytest.mark.parametrize("topology", ["v5p:2x2x2"])
def test_plan_for_a_slice(topology, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)  # the tests have their own
    # all sizes that XLA's TPU kernels tile: a few matrices of 128
    sizes = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    sizes |= {"n_routed_experts": 16, "num_experts_per_tok": 6}
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(model=sizes))
    started = time.monotonic()
    assert main(["plan", str(file), "--topology", topology, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n{topology}: {time.monotonic() - started:.0f} s, compiled in {found['compile_seconds']:.0f} s")
    assert (found["devices"], found["device_kind"], found["memory_of_device"]) == (8, "TPU v5", 95 * 2**30)
    memory = found["memory"]
    assert memory["total"] > memory["arguments"] + memory["temp"] > memory["parameters"] > 0
    exchanges = [row for row in found["communication"] if row["kind"] == "ragged-all-to-all"]
    assert {tuple(row["axes"]) for row in exchanges} == {("expert",)}
    assert {row["part"] for row in exchanges} == {"forward", "backward"}
    assert found["optimizer_beyond_exchanges"] == []


def test_a_mesh_that_the_torus_has_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("k2jax.cli.plan.use_cpu_devices", lambda count: None)
    arguments = ["--topology", "v5p:8x8x16", "--mesh.fsdp", "32", "--mesh.expert", "32"]
    assert main(["plan", "configs/k2_1t.py", *arguments]) == 2
    message = capsys.readouterr().err
    assert "mesh.fsdp = 32, mesh.expert = 32: each must be a product of some of the dims of the torus" in message
    assert "nearest: mesh.fsdp = " in message
