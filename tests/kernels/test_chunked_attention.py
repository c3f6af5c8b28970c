"""Attention in chunks against all pairs in float64 NumPy: outputs, largest logits, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.kernels.chunked_attention import TokenIndex, _turns, chunked_attention

SCALE = 0.3


def make(k_BZHK, v_BZHU):
    return k_BZHK.swapaxes(1, 2), v_BZHU.swapaxes(1, 2)


def naive(q, k, v, index, segment, dout):
    """Output, largest logits [B, H, S] and gradients of q, k, v for the cotangent dout; [B, S, S] pairs, float64."""
    seen = (segment[:, :, None] == segment[:, None]) & (index[:, :, None] >= index[:, None])
    logits = np.where(seen[:, None], np.einsum("bhsk,bzhk->bhsz", q, k) * SCALE, -np.inf)
    largest = logits.max(-1)
    weight = np.exp(logits - largest[..., None])
    weight /= weight.sum(-1, keepdims=True)
    out = np.einsum("bhsz,bzhu->bhsu", weight, v)
    dweight = np.einsum("bhsu,bzhu->bhsz", dout, v)
    dlogit = weight * (dweight - (dweight * weight).sum(-1, keepdims=True)) * SCALE
    dq, dk = np.einsum("bhsz,bzhk->bhsk", dlogit, k), np.einsum("bhsz,bhsk->bzhk", dlogit, q)
    return out, largest, dq, dk, np.einsum("bhsz,bhsu->bzhu", weight, dout)


def documents(rng, rows, length, kind):
    if kind == "one":
        return np.zeros((rows, length), np.int32)
    if kind == "tokens":  # every document is one token long
        return np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return np.cumsum(rng.random((rows, length)) < 0.15, 1).astype(np.int32)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    ("kind", "length", "chunks", "negative"),
    [
        ("one", 32, (8, 8), False),
        ("one", 9, (1, 1), True),
        ("tokens", 13, (64, 5), False),
        ("several", 29, (8, 12), True),
    ],
)
def test_agrees_with_all_pairs(dtype, bound, kind, length, chunks, negative):
    rng = np.random.default_rng(length)
    q, dout = rng.normal(size=(2, 3, length, 12)), rng.normal(size=(2, 3, length, 8))
    k, v = rng.normal(size=(2, length, 3, 12)), rng.normal(size=(2, length, 3, 8))
    if negative:  # every logit, so every maximum, is below zero
        q, k = np.abs(q) + 0.1, -np.abs(k) - 0.1
    order = np.array([rng.permutation(length) for _ in range(2)]) if kind == "several" else np.arange(length)[None]
    index = np.broadcast_to(order, (2, length)).astype(np.int32)
    segment = documents(rng, 2, length, kind)
    want = naive(q, k, v, index, segment, dout)
    assert not negative or want[1].max() < 0
    with jax.enable_x64(dtype == "float64"):
        at = TokenIndex(jnp.asarray(index), jnp.asarray(segment))

        def run(q, k, v):
            return chunked_attention(q, (k, v), (), make, at, at, SCALE, chunks)

        out, pull, largest = jax.vjp(lambda *x: run(*x), *(jnp.asarray(x, dtype) for x in (q, k, v)), has_aux=True)
        got = out, largest, *pull(jnp.asarray(dout, dtype))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(np.abs(b).max(), 1))


def test_future_and_other_documents_are_not_worked_on():
    """Of 8 x 8 chunk pairs 36 are causal; of two documents of four chunks each 20 are left."""
    index = jnp.arange(32, dtype=jnp.int32)[None]
    for segment, pairs in ((jnp.zeros_like(index), 36), (index // 16, 20)):
        at = TokenIndex(index, segment)
        first, end = _turns(at, at, (4, 4))
        assert int((end - first).sum()) == pairs


def test_no_array_of_all_pairs():
    """In the compiled forward and backward pass at 4,096 tokens no array has two dims that long."""
    import re

    length = 4096
    q = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    at = TokenIndex(index, jnp.zeros_like(index))

    def wide_arrays(attend):
        text = jax.jit(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))).lower(q, kv, kv).compile().as_text()
        shapes = {tuple(map(int, m.split(","))) for m in re.findall(r"\w\[([\d,]+)\]", text)}
        return [s for s in shapes if sum(n >= length for n in s) > 1]

    assert not wide_arrays(lambda q, k, v: chunked_attention(q, (k, v), (), make, at, at, 1.0, (256, 256))[0])
    assert wide_arrays(lambda q, k, v: jnp.einsum("bhsk,bzhk->bhsz", q, k) @ v.swapaxes(1, 2))
