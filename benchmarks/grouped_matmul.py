"""Forward and backward of `grouped_matmul` at several block sizes against one batched matmul of equal groups.

python benchmarks/grouped_matmul.py; times are interleaved in one process, and printed as ratios.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from k2jax.kernels.grouped_matmul import grouped_matmul
from k2jax.launch.commands import use_cpu_devices

ROWS, GROUPS, WIDTH, BLOCKS, ROUNDS = 8192, 8, 128, (64, 128, 256, 512), 9


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started


def main() -> None:
    use_cpu_devices(1)
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    w = jax.random.normal(jax.random.key(1), (GROUPS, WIDTH, WIDTH))
    sizes = jnp.full(GROUPS, ROWS // GROUPS, jnp.int32)

    def gradient(multiply):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(multiply(x, w) ** 2), argnums=(0, 1)))

    candidates = {"batched": gradient(lambda x, w: x.reshape(GROUPS, -1, WIDTH) @ w)}
    candidates["ragged_dot"] = gradient(lambda x, w: jax.lax.ragged_dot(x, w, sizes))
    for block in BLOCKS:
        candidates[f"block {block}"] = gradient(lambda x, w, block=block: grouped_matmul(x, w, sizes, block))
    for function in candidates.values():
        seconds(function, x, w)
    rounds = [{name: seconds(function, x, w) for name, function in candidates.items()} for _ in range(ROUNDS)]
    for name in candidates:
        print(f"{name}: {statistics.median(r[name] / r['batched'] for r in rounds):.2f} x the batched matmul's time")


if __name__ == "__main__":
    main()
