"""The forward pass against the NumPy reference, and what follows from masking."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from k2jax.config import RopeConfig
from k2jax.model.transformer import build_model, declarations


def make_values(config, rng):
    """Parameters and router bias in float64; large enough for logits, router scores and gains to differ well."""
    weights = declarations(config)
    is_gain = jax.tree.map(lambda w: w.init == "ones", weights, is_leaf=lambda w: hasattr(w, "init"))
    params = jax.tree.map(
        lambda w, gain: rng.normal(float(gain), 0.2, w.shape), weights, is_gain, is_leaf=lambda w: hasattr(w, "init")
    )
    num_moe = config.num_hidden_layers - config.first_k_dense_replace
    bias = {"moe": {"ffn": {"bias": rng.normal(0, 0.2, (num_moe, config.n_routed_experts))}}} if num_moe else {}
    return params, bias


def make_batch(config, rng, batch=2, length=12):
    """Tokens, targets, positions and segment ids of rows that hold two documents each."""
    tokens, targets = rng.integers(0, config.vocab_size, (2, batch, length), dtype=np.int32)
    cuts = 4 + np.arange(batch) % 3
    segments = (np.arange(length) >= cuts[:, None]).astype(np.int32)
    positions = np.arange(length, dtype=np.int32) - segments * cuts[:, None].astype(np.int32)
    return tokens, targets, positions, segments


@partial(jax.jit, static_argnums=(0, 1), static_argnames="rope")
def apply(config, dtype, params, bias, tokens, targets, positions, segments, rope="plain"):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    model = build_model(config, params, bias, jnp.dtype(dtype), rope=rope)
    return model(tokens, positions, segments), model(tokens, positions, segments, targets=targets).loss


def worst(a, b):
    """Largest difference, relative to the largest value."""
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


STRETCHED = RopeConfig(factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.1, rope_theta=50.0)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, "plain"),
        ({"n_shared_experts": 0, "first_k_dense_replace": 0}, "plain"),
        ({"n_shared_experts": 2, "q_lora_rank": None}, "plain"),
        ({"first_k_dense_replace": 3}, "plain"),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "rope": STRETCHED}, "yarn"),
    ],
    ids=["plain", "no_dense_no_shared", "moonlight", "all_dense", "deepseek"],
)
def test_float64_agrees_with_reference(tiny, changes, rope):
    """1e-9 leaves room for the order of sums alone: rounding is 1e-16, a formula's slip is above 1e-6."""
    config = dataclasses.replace(tiny, **changes)
    rng = np.random.default_rng(0)
    params, bias = make_values(config, rng)
    tokens, targets, positions, segments = make_batch(config, rng)
    logits, largest, loads = reference.forward(params, bias, config, tokens, positions, segments, rope)
    with jax.enable_x64(True):
        batch = tokens, targets, positions, segments
        out, loss = jax.device_get(apply(config, "float64", params, bias, *batch, rope=rope))
    assert out.logits.dtype == np.float64
    assert worst(out.logits, logits) < 1e-9
    assert worst(out.report.max_logits, largest) < 1e-9
    assert np.array_equal(out.report.expert_load, loads)
    assert loss == pytest.approx(reference.cross_entropy_sum(logits, targets), rel=1e-9)


def test_float32_agrees_with_reference(tiny):
    """Float32 rounds at 6e-8; three layers of sums lose about a digit."""
    rng = np.random.default_rng(1)
    params, bias = make_values(tiny, rng)
    tokens, targets, positions, segments = make_batch(tiny, rng)
    logits, largest, loads = reference.forward(params, bias, tiny, tokens, positions, segments)
    out, loss = jax.device_get(apply(tiny, "float32", params, bias, tokens, targets, positions, segments))
    assert out.logits.dtype == np.float32
    assert worst(out.logits, logits) < 2e-6
    assert worst(out.report.max_logits, largest) < 2e-6
    assert np.array_equal(out.report.expert_load, loads)
    assert loss == pytest.approx(reference.cross_entropy_sum(logits, targets), rel=1e-6)


def test_router_bias_changes_the_choice(tiny):
    """The comparisons above would not see a bias that is dropped on both sides."""
    rng = np.random.default_rng(1)
    params, bias = make_values(tiny, rng)
    batch = make_batch(tiny, rng)
    drawn = jax.tree.map(lambda b: np.where(np.arange(b.shape[-1]) == 3, 10.0, b), bias)
    num_tokens = batch[0].size
    assert (apply(tiny, "float32", params, drawn, *batch)[0].report.expert_load[:, 3] == num_tokens).all()
    assert (apply(tiny, "float32", params, bias, *batch)[0].report.expert_load[:, 3] < num_tokens).all()


def test_future_and_other_documents_are_unseen(tiny):
    """Logits are the same, bit for bit, when a token is changed that they must not depend on."""
    rng = np.random.default_rng(2)
    params, bias = make_values(tiny, rng)
    tokens, targets, positions, segments = make_batch(tiny, rng)

    def logits(tokens):
        return np.asarray(apply(tiny, "float32", params, bias, tokens, targets, positions, segments)[0].logits)

    before = logits(tokens)
    second = np.argmax(segments[0])  # where row 0's second document begins
    for changed, affected in ((2, range(2, second)), (second + 3, range(second + 3, tokens.shape[1]))):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % tiny.vocab_size
        differs = (logits(other) != before).any(-1)
        assert np.flatnonzero(differs[0]).tolist() == list(affected)
        assert not differs[1].any()


def test_defaults_are_one_document_counted_from_zero(tiny):
    rng = np.random.default_rng(3)
    params, bias = make_values(tiny, rng)
    tokens, _, _, _ = make_batch(tiny, rng)
    logits, _, _ = reference.forward(
        params, bias, tiny, tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.zeros_like(tokens)
    )
    model = jax.jit(lambda p, b, t: build_model(tiny, p, b, jnp.dtype("float32"))(t))
    out = model(*jax.tree.map(lambda x: x.astype("float32"), (params, bias)), tokens)
    assert worst(out.logits, logits) < 2e-6


def test_gradient_agrees_with_differences_and_reaches_all(tiny):
    """Along one random direction per parameter; float64 central differences of the reference-checked loss."""
    rng = np.random.default_rng(4)
    params, bias = make_values(tiny, rng)
    batch = make_batch(tiny, rng)
    with jax.enable_x64(True):
        loss = jax.jit(lambda p: apply(tiny, "float64", p, bias, *batch)[1])
        grads = jax.jit(jax.grad(loss))(params)
        paths, values = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
        for i, (path, grad) in enumerate(zip(paths, jax.tree.leaves(grads), strict=True)):
            assert np.abs(grad).max() > 0, path
            direction = rng.normal(size=values[i].shape)
            step = 1e-6 * direction / np.linalg.norm(direction)

            def moved(sign, i=i, step=step):
                leaves = [v + sign * step if j == i else v for j, v in enumerate(values)]
                return float(loss(jax.tree.unflatten(jax.tree.structure(params), leaves)))

            slope = (moved(1) - moved(-1)) / 2
            # relative to the gradient's length: a random direction may be nearly orthogonal to it
            assert abs(slope - np.vdot(grad, step)) < 1e-5 * np.linalg.norm(grad) * np.linalg.norm(step), path
