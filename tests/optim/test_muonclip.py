"""MuonClip as a whole: who gets which rule, and two steps of the chain by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_newton_schulz import reference as orthogonalise

from k2jax.config import ModelConfig, OptimConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim import MatrixView, QKPart, Setup, by_path, matrix_labels, muonclip, muonclip_of


def test_groups_of_k2():
    """k2-facts 4.2: AdamW for embedding, head and gains; Muon for every other matrix, the router too."""
    pairs = jax.tree_util.tree_leaves_with_path(declarations(ModelConfig()), is_leaf=lambda x: isinstance(x, Weight))
    groups = {"adamw": set(), "muon": set()}
    for path, weight in pairs:
        groups[weight.group].add(jax.tree_util.keystr(path, simple=True, separator="."))
    norms = ("attention_norm", "ffn_norm", "attention.q_a_norm", "attention.kv_a_norm")
    attention = [f"attention.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")]
    swiglu = ("gate", "up", "down")
    moe = ["ffn.router", *(f"ffn.{name}" for name in swiglu), *(f"ffn.shared.{name}" for name in swiglu)]
    gains = ["norm", *(f"{stack}.{name}" for stack in ("dense", "moe") for name in norms)]
    assert groups["adamw"] == {"embedding", "head", *gains}
    assert groups["muon"] == {
        *(f"dense.{name}" for name in [*attention, *(f"ffn.{n}" for n in swiglu)]),
        *(f"moe.{name}" for name in [*attention, *moe]),
    }


WEIGHTS = {
    "gain": Weight("", "", "D", (6,), "gain", group="adamw"),
    "experts": Weight("E", "D", "F", (2, 6, 4), "experts.{E}", group="muon"),
}
BATCH_TOKENS = 1000


def by_hand(config, params, gradients):
    """Clip, AdamW or Muon, decay, learning rate (K2 report, Algorithm 1; warm-up over 10 steps), in float64."""
    gain, experts = params["gain"], params["experts"]
    m, v, buffer = np.zeros_like(gain), np.zeros_like(gain), np.zeros_like(experts)
    for step, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        g_gain, g_experts = (grads[k] * min(1, 0.5 / norm) for k in ("gain", "experts"))
        rate = 2e-4 * step / 10
        m, v = 0.9 * m + 0.1 * g_gain, 0.95 * v + 0.05 * g_gain**2
        adam = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        buffer = 0.95 * buffer + g_experts
        muon = np.stack([0.2 * np.sqrt(6) * orthogonalise(e) for e in 0.95 * buffer + g_experts])
        gain, experts = gain - rate * (adam + 0.1 * gain), experts - rate * (muon + 0.1 * experts)
    return {"gain": gain, "experts": experts}


@pytest.mark.parametrize("gradient_scale", [10.0, 0.01], ids=["clipped", "not_clipped"])
def test_chain_agrees_with_numpy(gradient_scale):
    """The distance moved, in float64 but for what the chain itself does in float32: Newton-Schulz and the schedule."""
    config = dataclasses.replace(OptimConfig(), max_grad_norm=0.5, ns_dtype="float32", warmup_tokens=10 * BATCH_TOKENS)
    rng = np.random.default_rng(0)
    params, *gradients = (
        {name: scale * rng.normal(size=w.shape) for name, w in WEIGHTS.items()} for scale in (1, *[gradient_scale] * 3)
    )
    expected = by_hand(config, params, gradients)
    with jax.enable_x64(True):
        tx = muonclip_of(Setup(config, WEIGHTS, BATCH_TOKENS, dict.fromkeys(WEIGHTS)))
        new = jax.tree.map(jnp.asarray, params)
        state = tx.init(new)
        for grads in gradients:
            updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, new, max_logits=jnp.zeros((1, 1)))
            new = optax.apply_updates(new, updates)
    new = jax.device_get(new)
    for name in WEIGHTS:
        moved, want = new[name] - params[name], expected[name] - params[name]
        np.testing.assert_allclose(moved, want, rtol=0, atol=3e-6 * np.abs(want).max(), err_msg=name)


def test_unlabelled_and_wrongly_labelled_parameters_are_named():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"\['b'\]: label 'sgd'; \['c'\]: label None"):
        muonclip(1e-3, {"a": "muon", "b": "sgd", "c": None}).init(params)
    with pytest.raises(ValueError, match="labels are not shaped like the parameters"):
        muonclip(1e-3, {"a": "muon", "b": "adamw"}).init(params)


def test_a_model_of_another_kind():
    """Plain arrays, a schedule, GQA's queries clipped: a regression that MuonClip brings down, run as optax is."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(64, 8)), rng.normal(size=(64, 4))
    params = {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.zeros(4)}
    parts = {"w": QKPart(0, ((2, 1.0),), merged=True), "b": None}
    tx = muonclip(optax.linear_schedule(0.3, 0.01, 60), matrix_labels, parts, 5.0, weight_decay=0.0)
    loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - target) ** 2)  # noqa: E731
    state, losses = tx.init(params), []
    for _ in range(60):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, max_logits=jnp.array([[1.0, 2.0]]))
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    best = np.mean((x @ np.linalg.lstsq(np.c_[x, np.ones(64)], target, rcond=None)[0][:8] - target) ** 2)
    assert losses[-1] < 1.3 * best < 0.3 * losses[0]
    zeros = jax.tree.map(jnp.zeros_like, params)
    free, clipped = (
        params["w"] + tx.update(zeros, state, params, max_logits=jnp.array([[1.0, top]]))[0]["w"] for top in (1.0, 10.0)
    )
    np.testing.assert_array_equal(clipped[:, :2], free[:, :2])
    np.testing.assert_allclose(clipped[:, 2:], free[:, 2:] / 2, rtol=1e-5)


ATTENTION = {"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}, "norm": {"scale": jnp.ones(8)}}


def test_labels_by_dims_are_refused_where_dims_do_not_tell():
    with pytest.raises(ValueError) as error:
        matrix_labels(ATTENTION)
    assert "query/kernel (8, 2, 4)" in str(error.value) and "query/bias (2, 4)" in str(error.value)
    assert "norm" not in str(error.value) and "by_path" in str(error.value)
    plain = {"w": jnp.ones((3, 4)), "bias": jnp.ones(4), "s": jnp.ones(())}
    assert matrix_labels(plain) == {"w": "muon", "bias": "adamw", "s": "adamw"}


def test_values_by_path():
    labels = by_path([("/kernel$", "muon"), ("", "adamw")])
    expected = {"query": {"kernel": "muon", "bias": "adamw"}, "norm": {"scale": "adamw"}}
    assert labels(ATTENTION) == expected
    with pytest.raises(ValueError) as error:
        by_path([("kernel", "muon"), ("kernal", "muon"), ("bias", "adamw")])(ATTENTION)
    assert str(error.value) == "by_path: norm/scale: no rule matches; 'kernal': decides for no parameter"
    with pytest.raises(ValueError) as error:
        by_path([("(kernel", "muon"), ("bias", "adamw"), ("*", None)])
    assert str(error.value) == (
        "by_path: '(kernel': is not a regular expression: missing ), unterminated subpattern at position 0; "
        "'*': is not a regular expression: nothing to repeat at position 0"
    )


def test_paths_of_nnx_are_those_of_its_pure_form():
    """nnx.Optimizer calls init() with Variables and update() with arrays: a rule must decide alike for both."""
    state = nnx.state(nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=nnx.Rngs(0)), nnx.Param)
    labels = by_path([("query/kernel$", "muon"), ("", "adamw")])
    assert nnx.as_pure(labels(state)) == labels(nnx.as_pure(state))
    for params in (state, nnx.as_pure(state)):
        with pytest.raises(ValueError, match=r"query/bias \(2, 4\); query/kernel \(8, 2, 4\)"):
            matrix_labels(params)


@pytest.mark.parametrize("by_function", [False, True])
def test_inside_an_outer_partition(by_function):
    """Frozen by optax's own way: nothing moves what is frozen, and the rest moves as without the partition."""
    params = {"q": jnp.ones((8, 2, 4)), "w": jnp.ones((8, 6)), "gain": jnp.ones(8)}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    labels = {"q": "muon", "w": "muon", "gain": "adamw"}
    parts = {"q": QKPart(0, ((4, 0.5),)), "w": None, "gain": None}
    views = {"q": MatrixView(0, 1), "w": MatrixView(0, 1), "gain": None}
    if by_function:
        labels, parts, views = (
            by_path([(f"^{name}$", value) for name, value in values.items()]) for values in (labels, parts, views)
        )
    inner = muonclip(1e-2, labels, parts, dimension_numbers=views, max_grad_norm=None)
    maxima = {"max_logits": jnp.full((1, 2), 250.0)}
    whole, _ = inner.update(grads, inner.init(params), params, **maxima)
    groups = {"q": "train", "w": "train", "gain": "frozen"}
    outer = optax.partition({"train": inner, "frozen": optax.set_to_zero()}, groups)
    updates, _ = outer.update(grads, outer.init(params), params, **maxima)
    assert not updates["gain"].any()
    for name in ("q", "w"):
        np.testing.assert_array_equal(updates[name], whole[name])
    masked = optax.masked(inner, {"q": True, "w": True, "gain": False})
    updates, _ = masked.update(grads, masked.init(params), params, **maxima)
    np.testing.assert_array_equal(updates["q"], whole["q"])
    with pytest.raises(ValueError, match="w.*label 'sgd'"):
        outer = optax.partition({"train": muonclip(1e-2, {"q": "muon", "w": "sgd", "gain": "adamw"})}, "train")
        outer.init(params)
