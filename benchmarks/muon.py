"""A Muon update of 12 matrices of 256 x 896 against optax.contrib's, in float32.

python benchmarks/muon.py; interleaved in one process. Prints the median ratio of the times, the share of the rate that
this machine's own matmul allows for the FLOPs done, and both distances to the polar factor of the SVD.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import matmul_rate, report, timed

from k2jax.launch.distributed import use_cpu_devices

COUNT, N, M, PAIRS = 12, 256, 896, 21
FASTER, RATE, FARTHER = 1.4, 0.75, 1e-4
# two parts of Gram steps (3 and 2): see optim/newton_schulz.py
GRAM_FLOPS = COUNT * (8 * N * N * M + 28 * N**3)


def main() -> int:
    use_cpu_devices(1)
    from k2jax.optim import MatrixView, scale_by_muon

    gradient = np.random.default_rng(0).normal(size=(COUNT, N, M)).astype(np.float32)
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
        rates.append(matmul_rate(1))
        pairs.append([timed(step)[0] for step in steps])
    ratio = statistics.median(b / a for a, b in pairs)
    share = GRAM_FLOPS / min(a for a, _ in pairs) / max(rates)
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    polar = u @ vt
    # each in its own scale: what counts is how far the singular values are from equal
    size = np.linalg.norm(polar)
    far = [np.linalg.norm(r * (size / np.linalg.norm(r)) - polar) / size for r in results]
    held = [
        report("Muon, optax.contrib's time over ours", f"{ratio:.2f}", f"at least {FASTER}", ratio >= FASTER),
        report(
            "Muon, share of the matmul rate for its own FLOPs", f"{share:.0%}", f"at least {RATE:.0%}", share >= RATE
        ),
        report(
            "Muon, distance from the polar factor",
            f"{far[0]:.6f}, optax's {far[1]:.6f}",
            f"at most {FARTHER:g} more",
            far[0] <= far[1] + FARTHER,
        ),
    ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
