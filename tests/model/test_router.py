"""The choice of experts: the bias selects and does not weigh."""

import numpy as np

from k2jax.model.moe import choose_experts

SCORES = np.array([[0.9, 0.5, 0.4, 0.1], [0.2, 0.3, 0.6, 0.8]], np.float32)


def test_bias_selects_and_does_not_weigh():
    """A bias of 1 on the worst expert makes it the first choice, with the weight of its own score."""
    experts, weights = choose_experts(SCORES, np.array([0, 0, 0, 1], np.float32), 2, 2.827)
    assert experts.tolist() == [[3, 0], [3, 2]]
    by_hand = 2.827 * np.array([[0.1 / (0.1 + 0.9), 0.9 / (0.1 + 0.9)], [0.8 / (0.8 + 0.6), 0.6 / (0.8 + 0.6)]])
    np.testing.assert_allclose(weights, by_hand, rtol=3e-7)  # a float32 sum, quotient and product


def test_equal_biases_change_nothing():
    for bias in (-3.0, 0.0, 3.0):
        experts, _ = choose_experts(SCORES, np.full(4, bias, np.float32), 3, 1.0)
        assert experts.tolist() == [[0, 1, 2], [3, 2, 1]]


def test_vanishing_scores_give_finite_weights():
    """The published 1e-20 in the denominator."""
    _, weights = choose_experts(np.zeros((1, 4), np.float32), np.zeros(4, np.float32), 2, 2.827)
    assert weights.tolist() == [[0.0, 0.0]]


def test_published_scaling_factor():
    """k2-facts 2.2: 2.827 is the mean of 1 / ||p||, p the renormalised best 8 of 384 sigmoids of N(0, 1) logits."""
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(2000, 384)))).astype(np.float32)
    _, weights = choose_experts(scores, np.zeros(384, np.float32), 8, 1.0)
    # 2.8276 in the facts, 2.827 in the config: both within 3e-4 (the sample's own error is 1e-5)
    np.testing.assert_allclose(np.mean(1 / np.linalg.norm(weights, axis=-1)), 2.827, rtol=3e-4)
