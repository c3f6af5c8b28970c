"""Forward and backward of the loss at the head over 163,840 ids against the loss of whole logits.

python benchmarks/loss.py; interleaved pairs in one process. Prints the ratios of temporary memory (of the compiled
programs) and of time (median), and the share of this machine's matmul rate; exits with 1 where memory is more than
1/16 or time more than 1.05 of naive's.
"""

import statistics
import sys

import jax
import optax
from measure import matmul_rate, report, timed

from k2jax.launch.distributed import use_cpu_devices

TOKENS, HIDDEN, IDS, PAIRS, LESS_MEMORY, MOST_TIME = 2048, 256, 163_840, 5, 16, 1.05


def main() -> int:
    use_cpu_devices(1)
    from k2jax.kernels.cross_entropy import linear_cross_entropy_sum

    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (TOKENS, HIDDEN)), jax.random.normal(keys[1], (HIDDEN, IDS)) * 0.05
    target = jax.random.randint(keys[2], (TOKENS,), 0, IDS)
    naive = lambda x, w, t: optax.softmax_cross_entropy_with_integer_labels(x @ w, t).sum()  # noqa: E731
    losses = linear_cross_entropy_sum, naive
    runs = [jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, target).compile() for loss in losses]
    ours, naive = (run.memory_analysis().temp_size_in_bytes for run in runs)
    for run in runs:
        timed(run, x, w, target)
    rate = matmul_rate()
    pairs = [[timed(run, x, w, target) for run in runs] for _ in range(PAIRS)]
    ratio, of_cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    share = 6 * TOKENS * HIDDEN * IDS / min(a[0] for a, _ in pairs) / rate
    memory = f"{ours / 1e6:.0f} MB of naive's {naive / 1e6:.0f} MB, 1/{naive / ours:.1f}"
    time = f"{ratio:.2f} of naive's ({of_cpu:.2f} of its CPU time), median of {PAIRS} pairs"
    held = [
        report("loss, temporary memory", memory, f"at most 1/{LESS_MEMORY}", ours * LESS_MEMORY <= naive),
        report("loss, time", f"{time}; {share:.0%} of the matmul rate", f"at most {MOST_TIME}", ratio <= MOST_TIME),
    ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
