"""Costs of optimizer, QK-Clip, bad-step guard and rounding metric in a whole training step, in float32.

python benchmarks/optimizer_share.py. The step is the one that the trainer compiles; each line takes it with and without
one part, in interleaved pairs in one process, and prints the part's share of the whole: the median over the pairs of
wall clock (to which the bound applies) and of CPU time, and that of the fastest wall clock of each. On a machine with
other work trust the last two more. Random tokens: no part's work depends on what it is given. Exits with 1 where a
share is over its bound.
"""

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import Config, DataConfig, ModelConfig, OptimConfig, PhasesConfig, TrainConfig
from k2jax.launch.distributed import use_cpu_devices

CHEAPEST = {"optim.optimizer": f"{Path(__file__).with_name('chains.py')}:sgd", "optim.qk_clip_tau": None}
STEPS_OF_SMALL_PARTS = 4


def config(sequences: int, microbatches: int) -> Config:
    """The model of the whole-step benchmark, with `sequences` of 512 tokens a step."""
    tokens = sequences * 512
    return Config(
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=1024,
            moe_intermediate_size=128,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
        ),
        optim=OptimConfig(ns_dtype="float32", warmup_tokens=tokens),
        phases=PhasesConfig(start_tokens=(0,), rope=("plain",), router_bias_rate=(1e-3,), balance_alpha=(1e-4,)),
        data=DataConfig(sequence_length=512, batch_sequences=sequences),
        train=TrainConfig(num_microbatches=microbatches, compute_dtype="float32", remat="none"),
    ).validate()


def random_batch(config: Config):
    """As many tokens as a step takes, one document a row."""
    from k2jax.train.batch import Batch

    shape = config.train.num_microbatches, -1, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(
        config.model.vocab_size, size=(2, config.data.batch_sequences, config.data.sequence_length), dtype=np.int32
    )
    inputs, targets = (jnp.asarray(t.reshape(shape)) for t in tokens)
    positions = jnp.broadcast_to(jnp.arange(config.data.sequence_length, dtype=jnp.int32), inputs.shape)
    return Batch(inputs, targets, positions, jnp.zeros_like(inputs))


@contextlib.contextmanager
def without(part: str | None):
    """Steps traced inside lack one part of every step: "guard" (its select and its test), or "metric" (rounding).

    A step that is good whatever happens has no select: XLA folds it.
    """
    stubs = {"guard": ("is_good", lambda *_: jnp.ones((), bool)), "metric": ("lost_updates", lambda *_: {})}
    if part is None:
        yield
        return
    name, stub = stubs[part]
    with mock.patch(f"k2jax.train.step.{name}", stub):
        yield


def make_step(config: Config, part: str | None = None) -> Callable[[], None]:
    """A function that runs one training step to its end, compiled and warm, its state kept between calls."""
    from k2jax.sharding.mesh import make_mesh
    from k2jax.sharding.rules import spec
    from k2jax.train.optimizer import make_optimizer
    from k2jax.train.state import init_state
    from k2jax.train.step import make_train_step

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), without(part):
        tx = make_optimizer(config, mesh)
        state = init_state(config, tx)
        batch = jax.device_put(random_batch(config), jax.NamedSharding(mesh, spec("MBT")))
        compiled = jax.jit(make_train_step(config, tx), donate_argnums=0).lower(state, batch).compile()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    step()
    return step


def seconds(step: Callable[[], None], count: int) -> np.ndarray:
    """Wall clock and CPU time of `count` steps."""
    started = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return np.array([time.perf_counter() - started[0], time.process_time() - started[1]])


def measure(whole: Callable[[], None], less: Callable[[], None], pairs: int, count: int) -> np.ndarray:
    """Seconds [pairs, 2, 2] of `count` steps: of the whole step and of the other; wall clock and CPU time."""
    times = []
    for pair in range(pairs):  # the order changes, so that neither always comes after the other
        both = [seconds(step, count) for step in ((whole, less) if pair % 2 else (less, whole))]
        times.append(both if pair % 2 else both[::-1])
    return np.array(times)


def report(name: str, times: np.ndarray, bound: float | None) -> bool:
    """Print one line; whether the bound, if there is one, holds for the median wall clock."""
    wall, cpu = np.median(1 - times[:, 1] / times[:, 0], 0)
    fastest = 1 - times[:, 1, 0].min() / times[:, 0, 0].min()
    holds = bound is None or wall <= bound
    verdict = "    " if bound is None else "pass" if holds else "FAIL"
    limit = "no bound" if bound is None else f"at most {bound:.0%}"
    shares = f"{wall:.1%} of the step ({limit}), {cpu:.1%} of its CPU time, {fastest:.1%} of the fastest"
    print(f"{verdict}  {name}: {shares}; {len(times)} pairs", flush=True)
    return holds


def compare(sequences: int, microbatches: int, lines: list[tuple], pairs: int) -> list[bool]:
    """Measure and report every line (name, changes of the whole step, changes of the other, part it lacks, bound)."""
    base = config(sequences, microbatches)
    steps, held = {}, []

    def step_of(changes: dict, part: str | None = None):
        key = tuple(changes.items()), part
        steps[key] = steps.get(key) or make_step(base.replace(changes), part)
        return steps[key]

    for name, of_whole, of_less, part, bound in lines:
        # One step's time varies by 5 %: a bound of a part in a hundred needs more steps a side than one.
        count = STEPS_OF_SMALL_PARTS if bound is not None and bound < 0.02 else 1
        times = measure(step_of(of_whole), step_of(of_less, part), pairs, count)
        if name == lines[0][0]:
            wall, cpu = np.median(times[:, 0], 0)
            print(f"step of {base.batch_tokens:,} tokens: {wall:.2f} s, {cpu:.2f} CPU-seconds", flush=True)
        held.append(report(name, times, bound))
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="of steps of 4,096 tokens (default: %(default)s)")
    parser.add_argument("--large-pairs", type=int, default=5, help="of steps of 32,768 tokens (default: %(default)s)")
    args = parser.parse_args()
    use_cpu_devices(1)
    bf16 = {"optim.ns_dtype": "bfloat16"}
    small = [
        ("optimizer", {}, CHEAPEST, None, 0.30),
        ("optimizer, Newton-Schulz in bfloat16", bf16, CHEAPEST, None, None),
        ("QK-Clip", {}, {"optim.qk_clip_tau": None}, None, 0.01),
        ("bad-step guard", {}, {}, "guard", None),
        ("rounding metric", {}, {}, "metric", None),
    ]
    held = compare(8, 1, small, args.pairs)
    held += compare(64, 8, [("optimizer", {}, CHEAPEST, None, 0.06)], args.large_pairs)
    print(f"peak memory of all of this: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
