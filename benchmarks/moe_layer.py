"""Forward and backward of the routed experts on one CPU device, against `lax.ragged_dot` and the masked-dense einsum.

python benchmarks/moe_layer.py [--blocks]. 4,096 tokens of width 256, 32 experts of width 128, top-4, Zipf routing,
float32. All candidates are taken in turn in one process; ratios are medians over the rounds, and of CPU time beside
wall clock, for machines with other work. "matmul rate": the fastest of ten jitted float32 2048^3 `jnp.dot`.
Exits with 1 where a bound is missed. --blocks compares block sizes of the grouped matmul instead.
"""

import argparse
import statistics
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from measure import report as show_line
from measure import timed

from k2jax.kernels.grouped_matmul import BLOCK_ROWS, grouped_matmul
from k2jax.launch.distributed import use_cpu_devices
from k2jax.sharding.exchange import exchange_experts

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOICES = 4096, 256, 128, 32, 4
FORWARD_FLOPS = 2 * TOKENS * CHOICES * 3 * HIDDEN * WIDTH
ROUNDS, SLOW_ROUNDS = 11, 2  # the comparators take seconds
AT_LEAST = {"ragged_dot": 15.0, "masked dense": 4.0}  # times the time of ours, forward and backward
SHARE_GOAL, IMBALANCE = 0.40, 1.3


def zipf_routing(rng) -> np.ndarray:
    """Distinct experts [tokens, choices], expert e drawn in proportion to 1 / (e + 1)."""
    score = np.log(1 / np.arange(1, EXPERTS + 1)) + rng.gumbel(size=(TOKENS, EXPERTS))
    return np.argsort(-score, 1)[:, :CHOICES].astype(np.int32)


def balanced_routing() -> np.ndarray:
    """Every expert gets the same number of rows."""
    return ((np.arange(TOKENS)[:, None] * CHOICES + np.arange(CHOICES)) % EXPERTS).astype(np.int32)


def grouped_layer(implementation, block, expert_TA, x_TD, weight_TA, gate_EDF, up_EDF, down_EFD):
    """As model/moe.py has it: returns y [T, D] and the rows dropped."""

    def experts(row_WD, weight_W, group_sizes_E):
        multiply = partial(grouped_matmul, group_sizes_G=group_sizes_E, implementation=implementation, block=block)
        gate_WF, up_WF = jnp.split(multiply(row_WD, (gate_EDF, up_EDF)), 2, 1)
        return multiply(jax.nn.silu(gate_WF) * up_WF * weight_W[:, None], (down_EFD,))

    out = exchange_experts(x_TD, expert_TA, weight_TA, experts, EXPERTS, None, 1)
    return out.y_TD, out.dropped


def masked_dense_layer(expert_TA, x_TD, weight_TA, gate_EDF, up_EDF, down_EFD):
    """Every expert works on every token, and the weights mask what was not chosen."""
    weight_TE = jnp.sum((expert_TA[..., None] == jnp.arange(EXPERTS)) * weight_TA[..., None], 1)
    hidden = jax.nn.silu(jnp.einsum("TD,EDF->ETF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->ETF", x_TD, up_EDF)
    return jnp.einsum("ETF,EFD,TE->TD", hidden, down_EFD, weight_TE), 0


def both_passes(layer, expert_TA):
    """(forward, forward and backward) of (x, weights, gate, up, down); jitted, the routing as unknown as in a model."""

    def loss(expert_TA, *arguments):
        y_TD, dropped = layer(expert_TA, *arguments)
        return jnp.sum(y_TD * y_TD), dropped

    forward, both = jax.jit(layer), jax.jit(jax.grad(loss, tuple(range(1, 6)), has_aux=True))
    return partial(forward, expert_TA), partial(both, expert_TA)


def measure(candidates: dict[str, tuple], arguments, slow=()) -> dict[str, np.ndarray]:
    """{name: [rounds, (forward, both), (wall, CPU)]} seconds, taken in turn; a candidate of `slow` in fewer rounds."""
    for forward, both in candidates.values():
        timed(forward, *arguments), timed(both, *arguments)
    times = {name: [] for name in candidates}
    for index in range(ROUNDS):
        for name, functions in candidates.items():
            if name not in slow or index < SLOW_ROUNDS:
                times[name].append([timed(f, *arguments) for f in functions])
    return {name: np.array(rounds) for name, rounds in times.items()}


def matmul_rate() -> tuple[float, float]:
    """FLOP per second of wall clock and per CPU-second; called where the candidates run, before and after."""
    a = jnp.ones((2048, 2048))
    dot = jax.jit(jnp.dot)
    timed(dot, a, a)
    return tuple(2 * 2048**3 / min(column) for column in zip(*(timed(dot, a, a) for _ in range(10)), strict=True))


def ratio(times, name, other, column) -> tuple[float, float]:
    """Median over the rounds of the time of `other` over that of `name`: wall, CPU."""
    rounds = min(len(times[name]), len(times[other]))
    return tuple(
        statistics.median(times[other][:rounds, column, kind] / times[name][:rounds, column, kind]) for kind in (0, 1)
    )


def compare_blocks(arguments, routing) -> None:
    blocks = (128, 192, 256, 384, 512)
    layers = {f"block {b}": both_passes(partial(grouped_layer, "blocked", b), routing) for b in blocks}
    times = measure(layers, arguments)
    for name in layers:
        forward, both = (ratio(times, f"block {BLOCK_ROWS}", name, column) for column in (0, 1))
        print(f"{name}: {forward[0]:.2f} / {both[0]:.2f} x block {BLOCK_ROWS}, forward / forward and backward "
              f"(CPU time {forward[1]:.2f} / {both[1]:.2f})")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", action="store_true", help="compare block sizes")
    args = parser.parse_args()
    use_cpu_devices(1)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(TOKENS, HIDDEN)), rng.random((TOKENS, CHOICES))
    gate, up = rng.normal(0, HIDDEN**-0.5, (2, EXPERTS, HIDDEN, WIDTH))
    down = rng.normal(0, WIDTH**-0.5, (EXPERTS, WIDTH, HIDDEN))
    arguments = [jnp.asarray(a, jnp.float32) for a in (x, weight, gate, up, down)]
    routing = zipf_routing(rng)
    if args.blocks:
        compare_blocks(arguments, routing)
        return 0
    ours = partial(grouped_layer, "blocked", BLOCK_ROWS)
    candidates = {
        "ours": both_passes(ours, routing),
        "balanced": both_passes(ours, balanced_routing()),
        "masked dense": both_passes(masked_dense_layer, routing),
        "ragged_dot": both_passes(partial(grouped_layer, "ragged_dot", BLOCK_ROWS), routing),
    }
    before = matmul_rate()
    times = measure(candidates, arguments, slow=("masked dense", "ragged_dot"))
    rate = np.maximum(before, matmul_rate())
    return report(candidates, arguments, times, rate)


def report(candidates, arguments, times, rate) -> int:
    """Print every figure beside its bound; 1 where one is missed."""
    failures = []

    def show(name, value, bound, holds):
        if not show_line(name, str(value), bound, holds):
            failures.append(name)

    print(f"matmul rate: {rate[0] / 1e9:.0f} GFLOP/s, {rate[1] / 1e9:.0f} per CPU-second")
    best = times["ours"].min(0)
    seconds = {"forward": best[0], "backward": best[1] - best[0], "forward and backward": best[1]}
    for (name, spent), flops in zip(seconds.items(), (1, 2, 3), strict=True):
        share = flops * FORWARD_FLOPS / spent / rate
        text = f"{spent[0] * 1e3:.1f} ms, {share[0]:.1%} of the matmul rate (of CPU time {share[1]:.1%})"
        show(name, text, f"goal {SHARE_GOAL:.0%}", share[1] >= SHARE_GOAL)
    for name, least in AT_LEAST.items():
        forward, both = (ratio(times, "ours", name, column) for column in (0, 1))
        text = f"{both[0]:.1f} x our time forward and backward, {forward[0]:.1f} x forward"
        show(name, f"{text} (CPU time {both[1]:.1f}, {forward[1]:.1f})", f"at least {least:g}", both[0] >= least)
    forward, both = (ratio(times, "balanced", "ours", column) for column in (0, 1))
    text = f"{both[0]:.2f} x balanced forward and backward, {forward[0]:.2f} x forward"
    show("Zipf", f"{text} (CPU time {both[1]:.2f}, {forward[1]:.2f})", f"at most {IMBALANCE}", both[0] <= IMBALANCE)
    dropped = int(candidates["ours"][0](*arguments)[1])
    show("rows dropped", dropped, "none", dropped == 0)
    reference, got = (candidates[name][1](*arguments)[0] for name in ("masked dense", "ours"))
    apart = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(got, reference, strict=True))
    show("gradients against masked dense", f"{apart:.1e} apart", "at most 1e-5", apart <= 1e-5)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
