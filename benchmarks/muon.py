"""A Muon update of 12 matrices of 256 x 896 against optax.contrib's, in float32.

python benchmarks/muon.py; interleaved in one process. Prints the median ratio of the times, the share of the rate that
this machine's own matmul allows for the FLOPs done, and both distances to the polar factor of the SVD.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from k2jax.launch.commands import use_cpu_devices

COUNT, N, M, PAIRS = 12, 256, 896, 21
# two parts of Gram steps (3 and 2): see optim/newton_schulz.py
GRAM_FLOPS = COUNT * (8 * N * N * M + 28 * N**3)


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started


def main() -> None:
    use_cpu_devices(1)
    from k2jax.optim import MatrixView, scale_by_muon

    gradient = np.random.default_rng(0).normal(size=(COUNT, N, M)).astype(np.float32)
    square = jnp.ones((2048, 2048))
    dot = jax.jit(jnp.dot)
    dot(square, square)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    ours = scale_by_muon(momentum=0.95, dtype=jnp.float32, dimension_numbers=MatrixView(1, 1))
    theirs = optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=numbers)
    steps, results = [], []
    for tx in (ours, theirs):
        step, state = jax.jit(tx.update), tx.init(jnp.asarray(gradient))
        results.append(np.asarray(step(jnp.asarray(gradient), state)[0]))
        steps.append(lambda step=step, state=state: step(jnp.asarray(gradient), state)[0])
    rates, pairs = [], []
    for _ in range(PAIRS):
        rates.append(2 * 2048**3 / seconds(dot, square, square))
        pairs.append([seconds(step) for step in steps])
    ratio = statistics.median(b / a for a, b in pairs)
    share = GRAM_FLOPS / min(a for a, _ in pairs) / max(rates)
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    polar = u @ vt
    # each in its own scale: what counts is how far the singular values are from equal
    size = np.linalg.norm(polar)
    far = [np.linalg.norm(r * (size / np.linalg.norm(r)) - polar) / size for r in results]
    print(f"optax.contrib.scale_by_muon / k2jax: {ratio:.2f} (median of {PAIRS} pairs)")
    print(f"share of the matmul rate ({max(rates) / 1e9:.0f} GFLOP/s) for its own FLOPs: {share:.0%}")
    print(f"distance from the polar factor: k2jax {far[0]:.6f}, optax {far[1]:.6f}")


if __name__ == "__main__":
    main()
