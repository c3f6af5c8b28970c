"""The router bias follows Moonlight's rule (appendix C)."""

import numpy as np

from k2jax.model.router_bias import update_router_bias


def test_formula_by_hand():
    """Loads 0, 10, 5, 9 have mean 6: signs of (mean - load) are +1, -1, +1, -1; a layer at its mean stays."""
    bias = np.array([[0.5, 0.0, 0.0, -0.5], [1.0, 2.0, 3.0, 4.0]], np.float32)
    load = np.array([[0, 10, 5, 9], [7, 7, 7, 7]], np.int32)
    expected = bias + 1e-3 * np.array([[1, -1, 1, -1], [0, 0, 0, 0]])
    np.testing.assert_allclose(update_router_bias(bias, load, 1e-3), expected, rtol=1e-6)


def test_uneven_signs_do_not_drift():
    """One expert takes all: its sign is -1, the others' +1, and the mean of the signs, 1/2, is taken off."""
    after = np.asarray(update_router_bias(np.zeros((1, 4), np.float32), np.array([[0, 0, 12, 0]], np.int32), 0.01))
    np.testing.assert_allclose(after, [[0.005, 0.005, -0.015, 0.005]], rtol=1e-6)


def test_mean_stays_zero_over_many_steps():
    """To rounding: 300 random loads move each bias far, their mean not at all."""
    rng = np.random.default_rng(0)
    bias = np.zeros((2, 16), np.float32)
    for _ in range(300):
        bias = update_router_bias(bias, rng.zipf(1.5, (2, 16)).clip(max=10_000).astype(np.int32), 1e-3)
    assert np.abs(bias).max() > 0.01
    assert np.abs(np.mean(bias, -1)).max() < 1e-6


def test_rate_zero_freezes():
    bias = np.array([[0.25, -0.25]], np.float32)
    np.testing.assert_array_equal(update_router_bias(bias, np.array([[3, 1]], np.int32), 0.0), bias)
