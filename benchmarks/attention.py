"""Forward and backward of chunked attention against naive attention, which holds all pairs: K2's head dims, and small.

python benchmarks/attention.py; interleaved pairs in one process. Prints the median ratio of the times and the share of
this machine's matmul rate; exits with 1 where chunked takes longer than naive.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
from measure import matmul_rate, report, timed

from k2jax.launch.distributed import use_cpu_devices

# (sequences, heads, tokens, key dim, value dim): the layer of `make train`; K2's heads
SHAPES, PAIRS, BOUND = ((16, 4, 256, 48, 32), (1, 2, 2048, 192, 128)), 7, 1.0


def split(k_BZHK, v_BZHU):
    return k_BZHK.swapaxes(1, 2), v_BZHU.swapaxes(1, 2)


def naive(q_BHSK, k_BZHK, v_BZHU, scale):
    k_BHZK, v_BHZU = split(k_BZHK, v_BZHU)
    logit_BHSZ = jnp.einsum("BHSK,BHZK->BHSZ", q_BHSK, k_BHZK) * scale
    index = jnp.arange(q_BHSK.shape[2])
    weight_BHSZ = jax.nn.softmax(jnp.where(index[:, None] >= index, logit_BHSZ, -jnp.inf))
    return jnp.einsum("BHSZ,BHZU->BHSU", weight_BHSZ, v_BHZU)


def main() -> int:
    use_cpu_devices(1)
    from k2jax.kernels.chunked_attention import TokenIndex, chunked_attention
    from k2jax.model.attention import chunk_tokens

    rate, held = matmul_rate(), []
    for batch, heads, length, key, value in SHAPES:
        keys = jax.random.split(jax.random.key(0), 4)
        sizes = (batch, heads, length, key), (batch, length, heads, key), (batch, length, heads, value)
        q, k, v = (jax.random.normal(one, size) for one, size in zip(keys, sizes, strict=False))
        dout = jax.random.normal(keys[3], (batch, heads, length, value))
        index = jnp.broadcast_to(jnp.arange(length), (batch, length))
        at, chunk, scale = TokenIndex(index, jnp.zeros_like(index)), chunk_tokens(length), key**-0.5

        def ours(q, k, v, at=at, chunk=chunk, scale=scale):
            return chunked_attention(q, (k, v), (), split, at, at, scale, (chunk, chunk))[0]

        def theirs(q, k, v, scale=scale):
            return naive(q, k, v, scale)

        runs = [jax.jit(jax.grad(lambda *x, f=f, d=dout: jnp.vdot(f(*x), d), (0, 1, 2))) for f in (ours, theirs)]
        for run in runs:
            timed(run, q, k, v)
        pairs = [[timed(run, q, k, v) for run in runs] for _ in range(PAIRS)]
        ratio, of_cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
        # two products forward, four backward and the logits once more; half of the pairs are visible
        flops = batch * heads * length**2 * (4 * key + 3 * value)
        share = flops / min(a[0] for a, _ in pairs) / rate
        name = f"attention, {batch} x {length} tokens, {heads} heads of {key}/{value}"
        figure = f"{ratio:.2f} of naive's time ({of_cpu:.2f} of its CPU time), median of {PAIRS} pairs"
        figure += f"; {share:.0%} of the matmul rate"
        held.append(report(name, figure, f"at most {BOUND:.0f}", ratio <= BOUND))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
