"""Forward and backward of a SwiGLU layer with `project`, against the same with `jnp.einsum`.

python benchmarks/project.py; interleaved pairs in one process. Prints the median ratio of the times, and the shares of
this machine's matmul rate.
"""

import statistics

import jax
import jax.numpy as jnp
from measure import matmul_rate, timed

from k2jax.kernels.project import project
from k2jax.launch.distributed import use_cpu_devices

BATCH, LENGTH, HIDDEN, WIDTH, PAIRS = 16, 256, 128, 512, 15


def layer_gradient(multiply):
    """Gradients of x and the three weights, with `multiply(equation, x, w)` for every projection."""

    def loss(x, gate, up, down):
        hidden = jax.nn.silu(multiply("BTD,DF->BTF", x, gate)) * multiply("BTD,DF->BTF", x, up)
        return jnp.sum(multiply("BTF,FD->BTD", hidden, down) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


def main() -> None:
    use_cpu_devices(1)
    keys = jax.random.split(jax.random.key(0), 4)
    rate = matmul_rate()
    shapes = ((BATCH, LENGTH, HIDDEN), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    arguments = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    ours, plain = layer_gradient(project), layer_gradient(jnp.einsum)
    timed(ours, *arguments), timed(plain, *arguments)
    pairs = [(timed(ours, *arguments)[0], timed(plain, *arguments)[0]) for _ in range(PAIRS)]
    flops = 3 * 3 * 2 * BATCH * LENGTH * HIDDEN * WIDTH
    print(f"einsum / project: {statistics.median(b / a for a, b in pairs):.2f} (median of {PAIRS} pairs)")
    shares = [f"{name} {flops / min(times) / rate:.0%}" for name, times in zip(("project", "einsum"), zip(*pairs))]
    print(f"share of the matmul rate ({rate / 1e9:.0f} GFLOP/s): {', '.join(shares)}")


if __name__ == "__main__":
    main()
