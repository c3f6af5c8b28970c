"""Compile time of the whole training step against depth: 61 layers and 6, of a tiny width.

python benchmarks/compile_time.py. Fresh compiles in one process, one of each after the other, caches cleared before
every one. Prints the ratio of the medians and of the fastest, of wall clock and of CPU time, and the number of HLO
instructions, which does not depend on the machine. Exits with 1 where the fastest CPU times are more than 1.2 apart.
"""

import argparse
import re
import sys
import time

import jax
import numpy as np

from k2jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from k2jax.launch.distributed import use_cpu_devices
from k2jax.sharding.mesh import single_device_mesh
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state
from k2jax.train.step import make_train_step

DEPTHS = 61, 6


def config(num_layers: int) -> Config:
    """All features of K2's step at a width of 32."""
    return Config(
        model=ModelConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=2, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
            moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        ),
        optim=OptimConfig(ns_dtype="float32"),
        data=DataConfig(sequence_length=16, batch_sequences=4),
        train=TrainConfig(num_microbatches=2, compute_dtype="float32"),
    ).validate()  # fmt: skip


def compile_step(config: Config) -> tuple[np.ndarray, int]:
    """(wall clock and CPU seconds of tracing and compiling, instructions of the compiled program)."""
    jax.clear_caches()
    mesh = single_device_mesh()
    shape = config.train.num_microbatches, 2, config.data.sequence_length
    batch = jax.ShapeDtypeStruct(shape, "int32", sharding=jax.NamedSharding(mesh, spec("MBT")))
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, mesh)
        state = abstract_state(config, tx, mesh)
        started = np.array([time.perf_counter(), time.process_time()])
        step = jax.jit(make_train_step(config, tx), donate_argnums=0)
        compiled = step.lower(state, Batch(*[batch] * len(Batch._fields))).compile()
        seconds = np.array([time.perf_counter(), time.process_time()]) - started
    return seconds, len(re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="fresh compiles of each depth (default: %(default)s)")
    args = parser.parse_args()
    use_cpu_devices(1)
    found = [[compile_step(config(n)) for n in DEPTHS] for _ in range(args.pairs)]
    seconds = np.array([[one[0] for one in pair] for pair in found])  # [pairs, depths, 2]
    (deep, shallow), fastest = np.median(seconds, 0), seconds.min(0)
    print(f"{DEPTHS[0]} layers {deep[0]:.1f} s, {deep[1]:.1f} CPU-seconds; {DEPTHS[1]} layers {shallow[0]:.1f} s, "
          f"{shallow[1]:.1f} CPU-seconds (medians of {args.pairs})")  # fmt: skip
    of_medians, of_fastest = deep / shallow, fastest[0] / fastest[1]
    print(f"ratio of the medians {of_medians[0]:.2f} wall, {of_medians[1]:.2f} CPU; of the fastest "
          f"{of_fastest[0]:.2f} wall, {of_fastest[1]:.2f} CPU")  # fmt: skip
    print("instructions: " + ", ".join(f"{n} layers {one[1]:,}" for n, one in zip(DEPTHS, found[0], strict=True)))
    return 0 if of_fastest[1] <= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main())
