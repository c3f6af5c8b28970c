"""The choice of experts: the bias selects and does not weigh; groups; the sequence-wise balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import ModelConfig
from k2jax.model.moe import choose_experts, sequence_balance

SCORES = np.array([[0.9, 0.5, 0.4, 0.1], [0.2, 0.3, 0.6, 0.8]], np.float32)


def router(num_choices, factor=1.0, **groups):
    return ModelConfig(num_experts_per_tok=num_choices, routed_scaling_factor=factor, **groups)


def test_bias_selects_and_does_not_weigh():
    """A bias of 1 on the worst expert makes it the first choice, with the weight of its own score."""
    experts, weights = choose_experts(SCORES, np.array([0, 0, 0, 1], np.float32), router(2, 2.827))
    assert experts.tolist() == [[3, 0], [3, 2]]
    by_hand = 2.827 * np.array([[0.1 / (0.1 + 0.9), 0.9 / (0.1 + 0.9)], [0.8 / (0.8 + 0.6), 0.6 / (0.8 + 0.6)]])
    np.testing.assert_allclose(weights, by_hand, rtol=3e-7)  # a float32 sum, quotient and product


def test_equal_biases_change_nothing():
    for bias in (-3.0, 0.0, 3.0):
        experts, _ = choose_experts(SCORES, np.full(4, bias, np.float32), router(3, 1.0))
        assert experts.tolist() == [[0, 1, 2], [3, 2, 1]]


def test_vanishing_scores_give_finite_weights():
    """The published 1e-20 in the denominator."""
    _, weights = choose_experts(np.zeros((1, 4), np.float32), np.zeros(4, np.float32), router(2, 2.827))
    assert weights.tolist() == [[0.0, 0.0]]


def test_published_scaling_factor():
    """k2-facts 2.2: 2.827 is the mean of 1 / ||p||, p the renormalised best 8 of 384 sigmoids of N(0, 1) logits."""
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(2000, 384)))).astype(np.float32)
    _, weights = choose_experts(scores, np.zeros(384, np.float32), router(8, 1.0))
    # 2.8276 in the facts, 2.827 in the config: both within 3e-4 (the sample's own error is 1e-5)
    np.testing.assert_allclose(np.mean(1 / np.linalg.norm(weights, axis=-1)), 2.827, rtol=3e-4)


def by_hand(scores, bias, num_choices, n_group, topk_group):
    """DeepSeek-V3's node-limited routing, one token at a time, with lists."""
    size = len(bias) // n_group
    chosen = []
    for row in scores:
        biased = [s + b for s, b in zip(row, bias, strict=True)]
        groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
        ranked = sorted(groups, key=lambda g, biased=biased: -sum(sorted(biased[e] for e in g)[-2:]))
        allowed = [e for g in ranked[:topk_group] for e in g]
        chosen.append(sorted(sorted(allowed, key=lambda e, biased=biased: -biased[e])[:num_choices]))
    return chosen


@pytest.mark.parametrize(("n_group", "topk_group"), [(8, 4), (4, 1), (2, 2), (1, 1)])
def test_groups_against_lists(n_group, topk_group):
    """Biases reach below minus the score, where a mask of zeros instead of -inf would choose a masked expert."""
    rng = np.random.default_rng(0)
    scores, bias = rng.random((50, 16)).astype(np.float32), rng.normal(-1, 0.5, 16).astype(np.float32)
    experts, weights = choose_experts(scores, bias, router(4, 2.5, n_group=n_group, topk_group=topk_group))
    assert np.sort(experts, -1).tolist() == by_hand(scores, bias, 4, n_group, topk_group)
    np.testing.assert_allclose(np.sum(weights, -1), 2.5, rtol=1e-6)


def test_sequence_balance_is_one_for_even_use():
    """Each token prefers another pair of experts, each expert is preferred as often: f_i = P_i * E = 1."""
    score = np.full((2, 4, 8), 0.1)
    for t in range(4):
        score[:, t, 2 * t : 2 * t + 2] = 0.9
    assert sequence_balance(jnp.asarray(score, jnp.float32), 2) == pytest.approx(1.0, rel=1e-6)


def test_sequence_balance_by_its_formula():
    """DeepSeek-V3 report eq. 17-20 with loops; the gradient reaches the scores through P alone."""
    score = np.random.default_rng(0).random((3, 5, 6)).astype(np.float32)
    total = 0.0
    for row in score:
        chosen = [sorted(range(6), key=lambda e, s=s: -s[e])[:2] for s in row]
        for e in range(6):
            frequency = 6 / (2 * 5) * sum(e in c for c in chosen)
            total += frequency * np.mean([s[e] / s.sum() for s in row])
    assert sequence_balance(jnp.asarray(score), 2) == pytest.approx(total / 3, rel=1e-6)
    gradient = jax.grad(lambda s: sequence_balance(s, 2))(jnp.asarray(score))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3
    # shares do not change when all scores of a token grow alike
    np.testing.assert_allclose(np.sum(gradient * score, -1), 0, atol=1e-7)


def test_sequence_balance_sees_each_sequence():
    """Two sequences that each use two experts alone are unbalanced, though together they use all four."""
    score = np.full((2, 4, 4), 0.01, np.float32)
    score[0, :, :2] = score[1, :, 2:] = 0.99
    assert sequence_balance(jnp.asarray(score), 2) == pytest.approx(2.0, rel=0.02)
    assert sequence_balance(jnp.asarray(score.reshape(1, 8, 4)), 2) == pytest.approx(1.0, rel=1e-6)
