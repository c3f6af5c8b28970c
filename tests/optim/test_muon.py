"""Muon as a transform: its momentum, its scale, its view of a parameter as matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_newton_schulz import reference as orthogonalise

from k2jax.optim.muon import MatrixView, as_matrices, scale_by_muon

SHAPES = {"matrix": (6, 9), "stack": (3, 8, 5), "heads": (2, 6, 4, 3), "output": (2, 4, 3, 6)}
VIEWS = {"matrix": MatrixView(0, 1), "stack": MatrixView(1, 1), "heads": MatrixView(1, 1), "output": MatrixView(1, 2)}
MATRICES = {"matrix": (6, 9), "stack": (3, 8, 5), "heads": (2, 6, 12), "output": (2, 12, 6)}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def run(steps, **options):
    """Updates of `steps` successive gradients, in float64."""
    with jax.enable_x64(True):
        tx = scale_by_muon(VIEWS, ns_dtype=jnp.float64, **options)
        state = tx.init(jax.tree.map(jnp.asarray, gradients(0)))
        results = []
        for step in range(steps):
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradients(step)), state)
            results.append(jax.device_get(updates))
        return results


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_agree_with_a_loop(nesterov):
    """M = mu M + G, a sum; Nesterov feeds mu M + G (Moonlight 2.2). Every matrix of a stack on its own."""
    momentum, rms = 0.9, 0.3
    results = run(3, nesterov=nesterov, momentum=momentum, rms=rms)
    for name, shape in SHAPES.items():
        matrices = MATRICES[name]
        buffer = np.zeros(shape)
        for step in range(3):
            g = gradients(step)[name]
            buffer = momentum * buffer + g
            target = (momentum * buffer + g if nesterov else buffer).reshape(-1, *matrices[-2:])
            expected = np.stack([rms * np.sqrt(max(matrices[-2:])) * orthogonalise(m) for m in target]).reshape(shape)
            np.testing.assert_allclose(results[step][name], expected, rtol=0, atol=1e-12, err_msg=f"{name} {step}")


def test_views():
    for name, shape in SHAPES.items():
        x = np.arange(np.prod(shape)).reshape(shape)
        assert as_matrices(x, VIEWS[name]).shape == MATRICES[name], name
    # inputs are rows: q_b [Q, H, K] at (q, h, k) is entry (q, h * |K| + k)
    assert as_matrices(np.arange(24).reshape(2, 3, 4), MatrixView(0, 1))[1, 2 * 4 + 3] == 23


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 96)], ids=str)
def test_rms_of_the_update(shape):
    """0.2 * f where all singular values are equal, f being Newton-Schulz's there; near 0.2 for a Gaussian."""
    rng = np.random.default_rng(0)
    short = min(shape)
    equal = np.linalg.qr(rng.normal(size=(max(shape), short)))[0]
    equal = equal if shape[0] > shape[1] else equal.T
    f = np.linalg.norm(orthogonalise(equal), 2)
    exact = 0.2 * f * (1 - 1e-5), 0.2 * f * (1 + 1e-5)
    for gradient, (low, high) in ((equal, exact), (rng.normal(size=shape), (0.16, 0.22))):
        gradient = gradient.astype(np.float32)
        tx = scale_by_muon(MatrixView(0, 1), ns_dtype=jnp.float32)
        update, _ = tx.update(gradient, tx.init(gradient))
        assert low < np.sqrt(np.mean(np.square(update))) < high
