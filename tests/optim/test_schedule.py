"""The learning rate at the points that the K2 report names (2.5)."""

import dataclasses

import pytest

from k2jax.config import Config, OptimConfig
from k2jax.optim.schedule import learning_rate, learning_rate_of_step

K2_STEP = 67_108_864


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (250 * K2_STEP, 1e-4),  # half of the warm-up
        (500 * K2_STEP, 2e-4),
        (5e12, 2e-4),
        (10e12, 2e-4),
        (11.375e12, 2e-5 + 1.8e-4 * 0.853553391),  # a quarter of the cosine: (1 + cos(pi / 4)) / 2
        (12.75e12, 1.1e-4),
        (15.5e12, 2e-5),
        (20e12, 2e-5),
    ],
)
def test_k2_schedule(tokens, expected):
    """Rounding of 1e13 tokens to float32 moves the rate by 1e-7 of itself."""
    assert float(learning_rate(OptimConfig(), tokens)) == pytest.approx(expected, rel=5e-7, abs=1e-30)


def test_steps_count_from_zero_and_end_after_their_tokens():
    """Step 249 ends at half of the warm-up; step 0 already learns. K2's own batch, so 500 steps of warm-up."""
    assert Config().batch_tokens == K2_STEP
    for step, expected in ((0, 2e-4 / 500), (249, 1e-4), (499, 2e-4), (500, 2e-4)):
        assert float(learning_rate_of_step(OptimConfig(), step, K2_STEP)) == pytest.approx(expected, rel=5e-7)


def test_without_warmup_or_cosine():
    """No division by zero where a phase is empty."""
    flat = dataclasses.replace(OptimConfig(), warmup_tokens=0, constant_until_tokens=1000, cosine_until_tokens=1000)
    assert [float(learning_rate(flat, t)) for t in (1, 1000, 2000)] == pytest.approx([2e-4, 2e-4, 2e-5], rel=5e-7)
