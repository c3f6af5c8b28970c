"""Rotary embedding against published numbers and against complex rotation."""

import jax
import numpy as np
import pytest

from k2jax.config import ModelConfig, RopeConfig
from k2jax.model.rope import Rope, apply_rope, make_rope, rope_angles

K2 = make_rope(ModelConfig(), "plain")


def test_frequencies_are_k2s():
    """k2-facts 3.3: theta 5e4, dim 64, without YaRN."""
    frequency = K2.frequency
    expected = {0: 1.0, 1: 0.71311108, 2: 0.50852742, 18: 2.2742038e-3, 19: 1.6217599e-3, 20: 1.1564950e-3}
    assert len(frequency) == 32
    assert {i: frequency[i] for i in expected} == pytest.approx(expected, rel=1e-7)  # the digits given


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(), 0.13086080),
        (RopeConfig(factor=64.0), 0.14467963),
        (RopeConfig(rope_theta=10_000.0, factor=40.0, beta_fast=32.0), 0.13523378),
    ],
    ids=["k2", "k2_0905", "deepseek_v3"],
)
def test_yarn_scale_is_the_published_one(rope, expected):
    """k2-facts 3.3."""
    made = make_rope(ModelConfig(rope=rope), "yarn")
    assert (made.amplitude, made.softmax_scale) == pytest.approx((1.0, expected), rel=1e-7)
    assert make_rope(ModelConfig(rope=rope), "plain").softmax_scale == pytest.approx(0.07216878, rel=1e-7)


def test_yarn_of_k2_is_a_step():
    """k2-facts 3.3: pairs 0 to 19 as they are, 20 to 31 divided by the factor."""
    ratio = K2.frequency / make_rope(ModelConfig(), "yarn").frequency
    np.testing.assert_allclose(ratio, np.where(np.arange(32) < 20, 1, 32), rtol=1e-12)
    assert make_rope(ModelConfig(), "yarn").frequency[20] == pytest.approx(3.6140468e-5, rel=1e-7)


def test_yarn_of_deepseek_is_a_ramp():
    """k2-facts 3.3: from pair 10 to pair 23, in equal steps."""
    config = ModelConfig(rope=RopeConfig(rope_theta=10_000.0, factor=40.0, beta_fast=32.0))
    ratio = make_rope(config, "yarn").frequency / make_rope(config, "plain").frequency
    slowed = (1 - ratio) / (1 - 1 / 40)
    np.testing.assert_allclose(slowed, np.clip((np.arange(32) - 10) / 13, 0, 1), atol=1e-12)


def test_one_mscale_alone_changes_the_amplitude():
    """The amplitude is the quotient of both magnitudes; with mscale_all_dim 0 the softmax scale stays as it was."""
    made = make_rope(ModelConfig(rope=RopeConfig(mscale_all_dim=0.0)), "yarn")
    assert (made.amplitude, made.softmax_scale) == pytest.approx((1.3465736, 0.07216878), rel=1e-7)


def test_yarn_needs_a_factor():
    with pytest.raises(ValueError, match="factor"):
        make_rope(ModelConfig(rope=RopeConfig(factor=None)), "yarn")


def test_float32_angles_at_the_end_of_a_sequence():
    """An angle of 4095 radians has 2.4e-4 of float32 spacing; the frequency's own rounding must not add to it much."""
    exact = 4095 * 5e4 ** (-np.arange(0, 64, 2) / 64)
    angles = rope_angles(np.array([4095]), K2)
    assert angles.dtype == np.float32
    np.testing.assert_allclose(angles[0], exact, rtol=4e-7)


def test_pairs_turn_and_are_left_as_halves():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 4096, (2, 5))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None, None] * 5e4 ** (-np.arange(4) / 4))
    with jax.enable_x64(True):
        angles = rope_angles(positions, Rope(5e4 ** (-np.arange(4) / 4), 1.0, 1.0))[:, :, None]
        y = apply_rope(jax.numpy.asarray(x), angles)
        louder = apply_rope(jax.numpy.asarray(x), angles, 1.5)
    np.testing.assert_allclose(louder, 1.5 * np.asarray(y), rtol=1e-12)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), rtol=1e-9, atol=1e-10)
