"""Memory and time of a training step (SGD) under each `train.remat`, and the FLOPs that it recomputes.

python benchmarks/remat.py           this machine's CPU: temporary memory, and the time of a step against "none", in
                                     interleaved rounds in one process
python benchmarks/remat.py --tpu     compiled for four TPU v5p that need not be there (pip install libtpu): temporary
                                     memory on a chip and in its host, which the CPU's compiler does not tell apart

The last column is arithmetic at Kimi K2's size: matmuls of the forward pass that a policy repeats, over the model
FLOPs of a step of sequences of 4,096 tokens. Exits with 1 where memory does not fall in the order of the table.
"""

import argparse
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from k2jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, Remat, TrainConfig
from k2jax.launch.distributed import use_cpu_devices
from k2jax.model.flops import flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight, weight_leaves
from k2jax.plan.topology import topology_devices
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.compile_step import lower_step
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import init_state

POLICIES = typing.get_args(Remat)


def config(remat: str, tpu: bool) -> Config:
    """K2's proportions in small; on TPU in bfloat16, two sequences of 2,048 tokens a chip."""
    width = 1024 if tpu else 256
    return Config(
        model=ModelConfig(
            vocab_size=4096, hidden_size=width, num_hidden_layers=5 if tpu else 9, num_attention_heads=width // 64,
            q_lora_rank=width // 4, kv_lora_rank=width // 8, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
            intermediate_size=3 * width, moe_intermediate_size=width // 2, n_routed_experts=16, num_experts_per_tok=4,
        ),
        optim=OptimConfig(optimizer=f"{Path(__file__).with_name('chains.py')}:sgd", qk_clip_tau=None),
        data=DataConfig(sequence_length=2048 if tpu else 256, batch_sequences=8),
        mesh=MeshConfig(fsdp=4 if tpu else 1),
        train=TrainConfig(compute_dtype="bfloat16" if tpu else "float32", remat=remat),
    ).validate()  # fmt: skip


def stepper(config: Config, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled) -> Callable[[], float]:
    """step() -> its seconds of CPU time, on random tokens."""
    shape = config.train.num_microbatches, config.data.batch_sequences, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    batch = Batch(tokens, np.roll(tokens, -1, 2), positions, np.zeros_like(tokens))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, spec("MBT")))
    with jax.set_mesh(mesh):
        state = init_state(config, make_optimizer(config, mesh))

    def step() -> float:
        nonlocal state
        started = sum(os.times()[:2])
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        return sum(os.times()[:2]) - started

    step()
    return step


def repeated(weight: Weight, remat: str) -> bool:
    """True if the backward pass multiplies by this weight of a layer once more, forwards."""
    if remat == "none" or not weight.stack.startswith("L"):
        return False
    if remat.startswith("k2"):
        return any(name in weight.hf for name in ("q_b_proj", "kv_b_proj"))
    return "down_proj" not in weight.hf  # no gradient of a layer needs what is added to the stream at its end


def share_repeated(remat: str) -> float:
    """FLOPs done again over the model FLOPs of a step, for Kimi K2. Attention's own are left out: its backward pass
    makes the weights again whatever the policy is."""
    model = ModelConfig()
    weights = weight_leaves(declarations(model))
    flops = 0
    for weight in weights:
        active = weight.size
        if "E" in weight.stack:
            active = active // model.n_routed_experts * model.num_experts_per_tok
        flops += 2 * active * (weight.num_inputs > 0 and repeated(weight, remat))
    return flops / flops_per_token(weights, model, 4096)


def times(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median over the rounds of a policy's CPU time over that of "none" in the same round."""
    found = [{remat: step() for remat, step in steps.items()} for _ in range(rounds)]
    return {remat: float(np.median([one[remat] / one["none"] for one in found])) for remat in steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="compile for TPU v5p with libtpu; nothing is run")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each policy on the CPU (default: %(default)s)")
    args = parser.parse_args()
    use_cpu_devices(1)
    devices = topology_devices("v5p:2x2x1") if args.tpu else jax.devices()
    memory, steps = {}, {}
    for remat in POLICIES:
        mesh = make_mesh(config(remat, args.tpu).mesh, devices)
        compiled = lower_step(config(remat, args.tpu), mesh)[0].compile()
        sizes = compiled.memory_analysis()
        memory[remat] = sizes.temp_size_in_bytes, sizes.host_temp_size_in_bytes
        print(f"{remat}: compiled", file=sys.stderr, flush=True)
        if not args.tpu:
            steps[remat] = stepper(config(remat, args.tpu), mesh, compiled)
    ratios = times(steps, args.rounds) if steps else {}
    print("| train.remat | temp MiB | host MiB | CPU time of a step / none | FLOPs again, K2 |\n|---|---|---|---|---|")
    for remat, (device, host) in memory.items():
        ratio = f"{ratios[remat]:.2f}" if ratios else ""
        print(f"| {remat} | {device / 2**20:.1f} | {host / 2**20:.1f} | {ratio} | {share_repeated(remat):.1%} |")
    kept = {remat: device for remat, (device, _) in memory.items()}
    order = kept["none"] > kept["k2"] > kept["layer"] and kept["k2-offload"] <= kept["k2"]
    return 0 if order and kept["offload"] <= kept["layer"] else 1


if __name__ == "__main__":
    sys.exit(main())
