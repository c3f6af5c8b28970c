"""The loss at the head against float64 NumPy over all logits: value and gradients, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.kernels import cross_entropy
from k2jax.kernels.cross_entropy import linear_cross_entropy_sum
from k2jax.model.head import head_loss
from k2jax.sharding.rules import spec


def naive(x, w, target):
    logits = x @ w
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    dlogit = share - np.eye(w.shape[1])[target]
    return -np.log(share[np.arange(len(x)), target]).sum(), dlogit @ w.T, x.T @ dlogit


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(("tokens", "ids", "block"), [(40, 60, 1000), (37, 61, 7), (8, 5, 2)])
def test_agrees_with_all_logits(monkeypatch, dtype, bound, tokens, ids, block):
    """Several chunks and blocks, neither of which divides."""
    monkeypatch.setattr(cross_entropy, "BLOCK_IDS", block)
    monkeypatch.setattr(cross_entropy, "_chunk_tokens", lambda *sizes: 16)
    rng = np.random.default_rng(0)
    x, w, target = rng.normal(size=(tokens, 6)), rng.normal(size=(6, ids)), rng.integers(0, ids, tokens)
    target[:2] = 0, ids - 1
    loss, dx, dw = naive(x, w, target)
    with jax.enable_x64(dtype == "float64"):
        run = jax.value_and_grad(lambda x, w: 3 * linear_cross_entropy_sum(x, w, jnp.asarray(target)), (0, 1))
        arguments = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
        got, (got_dx, got_dw) = run(*arguments)
        plain = linear_cross_entropy_sum(*arguments, jnp.asarray(target))
    assert float(got) == pytest.approx(3 * loss, rel=bound) and float(plain) == pytest.approx(loss, rel=bound)
    for a, b in ((got_dx, 3 * dx), (got_dw, 3 * dw)):
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max())


@pytest.mark.parametrize("axes", [{"tensor": 4, "context": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_same_with_the_head_cut(mesh_of, axes):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2, 16, 6)).astype(np.float32), rng.normal(size=(6, 64)).astype(np.float32)
    target = rng.integers(0, 64, (2, 16)).astype(np.int32)
    loss, dx, dw = naive(x.reshape(-1, 6).astype(np.float64), w.astype(np.float64), target.reshape(-1))
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        put = lambda a, dims: jax.device_put(a, jax.NamedSharding(mesh, spec(dims)))  # noqa: E731
        run = jax.jit(jax.value_and_grad(head_loss, (0, 1)))
        got, (got_dx, got_dw) = jax.device_get(run(put(x, "BTD"), put(w, "DV"), put(target, "BT")))
    assert float(got) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(got_dx.reshape(-1, 6), dx, rtol=0, atol=1e-5 * np.abs(dx).max())
    np.testing.assert_allclose(got_dw, dw, rtol=0, atol=1e-5 * np.abs(dw).max())


def test_gradient_of_a_bf16_head_is_summed_in_float32():
    """Of 4,096 equal tokens: bf16 sums stop growing at 256 times their terms."""
    x, w = jnp.ones((4096, 2), jnp.bfloat16), jnp.zeros((2, 2), jnp.float32)
    dw = jax.grad(linear_cross_entropy_sum, 1)(x, w, jnp.zeros(4096, jnp.int32))
    assert dw.dtype == jnp.float32
    np.testing.assert_allclose(dw, [[-2048, 2048]] * 2, rtol=1e-6)


def test_memory_is_a_sixteenth(tokens=2048, hidden=256, ids=163_840):
    """Compiled only, forward and backward, against the loss of whole logits."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, hidden), (hidden, ids)))
    target = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def temp(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, target).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    naive = temp(lambda x, w, t: optax.softmax_cross_entropy_with_integer_labels(x @ w, t).sum())
    assert temp(linear_cross_entropy_sum) * 16 <= naive
