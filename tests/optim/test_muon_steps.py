"""Five steps of Muon against the published formula in float64 NumPy, matrix by matrix (Moonlight 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.optim import MatrixView, scale_by_muon

STEPS, MOMENTUM = 5, 0.95
SHAPES = {"tall": (96, 40), "wide": (40, 96), "square": (64, 64), "stacked": (2, 3, 24, 40), "uneven": (6, 24, 40)}


def newton_schulz(x):
    """Moonlight 2.1, as it is written: no transposition, no batch."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def gradients(shape, name, rank=None):
    """Of five steps, float64; the matrices of an uneven stack are a millionfold apart."""
    rng = np.random.default_rng(0)
    full = rng.normal(size=(STEPS, *shape))
    if rank is not None:  # of the same rows and columns in every step, so that the momentum has no more rank
        left, right = rng.normal(size=(*shape[:-1], rank)), rng.normal(size=(*shape[:-2], rank, shape[-1]))
        full = left @ rng.normal(size=(STEPS, *shape[:-2], rank, rank)) @ right
    return full * np.logspace(-6, 6, shape[0])[:, None, None] if name == "uneven" else full


def by_hand(grads):
    """M <- mu M + G; NewtonSchulz(mu M + G) * 0.2 sqrt(max(n, m)): the update of each step."""
    buffer, updates = np.zeros(grads.shape[1:]), []
    for g in grads:
        buffer = MOMENTUM * buffer + g
        matrices = (MOMENTUM * buffer + g).reshape(-1, *g.shape[-2:])
        update = np.stack([newton_schulz(m) * 0.2 * np.sqrt(max(m.shape)) for m in matrices])
        updates.append(update.reshape(g.shape))
    return updates


def by_k2jax(grads, dtype):
    tx = scale_by_muon(MOMENTUM, dtype=dtype, dimension_numbers=MatrixView(grads.ndim - 3, 1))
    with jax.enable_x64(True):
        state, updates = tx.init(jnp.zeros(grads.shape[1:], dtype)), []
        for g in grads:
            update, state = tx.update(jnp.asarray(g, dtype), state)
            updates.append(np.asarray(update, np.float64))
    return updates


def largest_distance(got, want):
    """Over steps and matrices, relative to the matrix' own update (Frobenius)."""
    far = [np.linalg.norm(g - w, axis=(-2, -1)) / np.linalg.norm(w, axis=(-2, -1)) for g, w in zip(got, want)]
    return np.max(far)


@pytest.mark.parametrize(
    ("dtype", "rank", "bound"),
    [("float64", None, 1e-10), ("float64", 3, 1e-10), ("float32", None, 1e-5), ("float32", 3, 5e-4)],
)
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_five_steps(name, dtype, rank, bound):
    grads = gradients(SHAPES[name], name, rank)
    assert largest_distance(by_k2jax(grads, jnp.dtype(dtype)), by_hand(grads)) < bound
