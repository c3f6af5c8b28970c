"""Rotary embedding against published numbers and against complex rotation."""

import jax
import numpy as np
import pytest

from k2jax.model.rope import apply_rope, rope_angles


def test_frequencies_are_k2s():
    """k2-facts 3.3: theta 5e4, dim 64, without YaRN; at position 1 the angle is the frequency."""
    with jax.enable_x64(True):
        frequency = np.asarray(rope_angles(np.array([1]), 64, 5e4))[0]
    expected = {0: 1.0, 1: 0.71311108, 2: 0.50852742, 18: 2.2742038e-3, 19: 1.6217599e-3, 20: 1.1564950e-3}
    assert len(frequency) == 32
    assert {i: frequency[i] for i in expected} == pytest.approx(expected, rel=1e-7)  # the digits given


def test_float32_angles_at_the_end_of_a_sequence():
    """An angle of 4095 radians has 2.4e-4 of float32 spacing; the frequency's own rounding must not add to it much."""
    exact = 4095 * 5e4 ** (-np.arange(0, 64, 2) / 64)
    angles = rope_angles(np.array([4095]), 64, 5e4)
    assert angles.dtype == np.float32
    np.testing.assert_allclose(angles[0], exact, rtol=4e-7)


def test_pairs_turn_and_are_left_as_halves():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 4096, (2, 5))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None, None] * 5e4 ** (-np.arange(4) / 4))
    with jax.enable_x64(True):
        y = apply_rope(jax.numpy.asarray(x), rope_angles(positions, 8, 5e4)[:, :, None])
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), rtol=1e-9, atol=1e-10)
