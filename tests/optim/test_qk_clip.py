"""QK-Clip: exact halving of one head's logits in the real attention layer, all else untouched bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from k2jax.model import mla
from k2jax.model.rope import make_rope
from k2jax.model.transformer import declarations, make_positions
from k2jax.model.weights import Stack, init_params
from k2jax.optim.qk_clip import QKPart, clip_factors, qk_clip
from k2jax.optim.setup import map_weights

HEAD = 2  # the one that grows


@pytest.fixture
def layer(tiny):
    """One attention layer's declarations and weights, and a function weights -> (logits [B, H, S, Z], values)."""
    config = dataclasses.replace(tiny, num_hidden_layers=1)
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(2, 9, config.hidden_size)).astype(np.float32)
    index = jnp.broadcast_to(jnp.arange(9), (2, 9))
    positions = make_positions(index, jnp.zeros_like(index), make_rope(config, "plain"))
    graph = nnx.graphdef(mla.MLA(Stack(config, 0, 1)))

    def look(weights, monkeypatch):
        """Run the layer on `weights` and note what its attention is given."""
        seen = {}

        def spy(q, sources, weights, make, q_at, k_at, scale, kernels, split):
            k, v = make(*sources, *split(*weights))
            seen["logits"] = scale * jnp.einsum("bhsk,bhzk->bhsz", q, k)
            seen["v"], seen["k_rope"] = v, k[..., -config.qk_rope_head_dim :]
            return attention(q, sources, weights, make, q_at, k_at, scale, kernels, split)

        attention = mla.attention
        with monkeypatch.context() as patch:
            patch.setattr(mla, "attention", spy)
            _, seen["max"] = nnx.merge(graph, jax.tree.map(lambda w: w[0], weights))(x_BTD, positions)
        return jax.tree.map(np.asarray, seen)

    declared = declarations(config)["dense"]["attention"]
    weights = init_params(declared, jax.random.key(0), 0.1)
    return declared, weights, look


def parts_of(declared):
    return map_weights(lambda w: w.qk and QKPart(w.first_layer, w.qk.powers), declared)


def scale_head(weights, factor):
    """The weights with HEAD's queries times `factor`, and so all its logits."""
    return weights | {"q_b": weights["q_b"].at[:, :, HEAD].multiply(factor)}


def test_logits_of_the_head_halve_and_nothing_else_moves(layer, monkeypatch, tiny):
    """S = 200 and tau = 100 (k2-facts 9.5). 1e-6 of the largest logit is a few roundings of float32."""
    declared, weights, look = layer
    weights = scale_head(weights, 200 / look(weights, monkeypatch)["max"][HEAD])
    before = look(weights, monkeypatch)
    assert before["max"][HEAD] == pytest.approx(200, rel=1e-6)
    assert np.delete(before["max"], HEAD).max() < 100
    tx = qk_clip(100.0, parts_of(declared))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = tx.update(zeros, tx.init(weights), weights, max_logits=before["max"][None])
    clipped = optax.apply_updates(weights, updates)
    after = look(clipped, monkeypatch)

    others = [h for h in range(tiny.num_attention_heads) if h != HEAD]
    np.testing.assert_allclose(after["logits"][:, HEAD], before["logits"][:, HEAD] / 2, rtol=0, atol=100 * 1e-6)
    assert after["max"][HEAD] == pytest.approx(100, rel=1e-6)
    np.testing.assert_array_equal(after["logits"][:, others], before["logits"][:, others])
    np.testing.assert_array_equal(after["v"], before["v"])
    np.testing.assert_array_equal(after["k_rope"], before["k_rope"])

    # and by weights: q_b and kv_b of HEAD, its no-position parts by sqrt(1/2) each, its rotary q by 1/2
    nope = tiny.qk_nope_head_dim
    changed = {name: np.asarray(clipped[name] != weights[name]) for name in weights}
    assert {name for name, c in changed.items() if c.any()} == {"q_b", "kv_b"}
    assert not changed["q_b"][:, :, others].any() and not changed["kv_b"][:, :, others].any()
    assert not changed["kv_b"][..., nope:].any()
    q_ratio, kv_ratio = (np.asarray(clipped[n] / weights[n])[0, :, HEAD] for n in ("q_b", "kv_b"))
    np.testing.assert_allclose(q_ratio[:, :nope], 0.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(q_ratio[:, nope:], 0.5, rtol=1e-6)
    np.testing.assert_allclose(kv_ratio[:, :nope], 0.5**0.5, rtol=1e-6)


def test_factors():
    """Signed: a negative S is no reason to clip, however large, and gives no NaN."""
    logits = [-500.0, 200.0, 100.0, 0.0, 100.001, 1e9, -jnp.inf, jnp.inf, jnp.nan]
    factors = clip_factors(jnp.array([logits]), 100.0)
    np.testing.assert_allclose(factors, [[1, 0.5, 1, 1, 100 / 100.001, 1e-7, 1, 1, 1]], rtol=1e-7)
    assert (np.asarray(factors)[0, [0, 2, 3, 6, 7, 8]] == 1).all()


def test_negative_maximum_beside_a_clipped_head(layer):
    declared, weights, _ = layer
    tx = qk_clip(100.0, parts_of(declared))
    max_logits = jnp.array([[-300.0, 50.0, 400.0, -1e-3]])
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights, max_logits=max_logits)
    moved = {name: np.flatnonzero(np.any(u != 0, (0, 1, 3))).tolist() for name, u in updates.items() if u.ndim == 4}
    assert moved == {"q_b": [HEAD], "kv_b": [HEAD], "o": []}
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_each_layer_of_a_stack_takes_its_own_row():
    """A stack that begins at layer 1 reads max_logits from row 1 on; one layer (no leading dim) reads its row."""
    stacked, single = jnp.ones((2, 3, 2, 5)), jnp.ones((3, 2, 5))
    parts = {"stacked": QKPart(1, ((4, 0.5), (1, 1.0))), "single": QKPart(0, ((5, 1.0),))}
    params = {"stacked": stacked, "single": single}
    max_logits = jnp.array([[400.0, 1.0], [1.0, 1.0], [1.0, 1600.0]])
    tx = qk_clip(100.0, parts)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=max_logits)
    new = optax.apply_updates(params, updates)
    expected_single = np.ones((3, 2, 5))
    expected_single[:, 0] = 1 / 4
    expected_stacked = np.ones((2, 3, 2, 5))
    expected_stacked[1, :, 1] = [1 / 4] * 4 + [1 / 16]
    np.testing.assert_allclose(new["single"], expected_single, rtol=1e-6)
    np.testing.assert_allclose(new["stacked"], expected_stacked, rtol=1e-6)


def test_after_any_optimizer(layer):
    """Chained after optax.adamw: the clip acts on the weights as that left them (Algorithm 1: after the update)."""
    declared, weights, _ = layer
    adamw = optax.adamw(1e-2)
    grads = jax.tree.map(jnp.cos, weights)
    plain, _ = adamw.update(grads, adamw.init(weights), weights)
    stepped = optax.apply_updates(weights, plain)
    tx = optax.chain(optax.adamw(1e-2), qk_clip(100.0, parts_of(declared)))
    updates, _ = tx.update(grads, tx.init(weights), weights, max_logits=jnp.array([[1.0, 2.0, 400.0, 3.0]]))
    new = optax.apply_updates(weights, updates)
    heads = np.where(np.arange(4) == HEAD, 0.25, 1.0)[:, None]
    nope = declared["q_b"].qk.powers[0][0]
    q_power, kv_power = np.ones(stepped["q_b"].shape[-1]), np.zeros(stepped["kv_b"].shape[-1])
    q_power[:nope] = kv_power[:nope] = 0.5
    expected = stepped | {"q_b": stepped["q_b"] * heads**q_power, "kv_b": stepped["kv_b"] * heads**kv_power}
    for name, want in expected.items():
        # p + (new - p) rounds once more than new, at the size of p
        np.testing.assert_allclose(new[name], want, rtol=0, atol=2e-7 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("kind", ["mha", "mha_merged", "gqa"])
def test_other_kinds_of_attention(kind):
    """Queries and keys of plain attention: the logits of the head over tau come down to it, the others keep theirs."""
    rng = np.random.default_rng(0)
    num_heads, head_dim, width = 4, 6, 16
    num_keys = 2 if kind == "gqa" else num_heads
    q = jnp.asarray(rng.normal(size=(width, num_heads, head_dim)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(width, num_keys, head_dim)), jnp.float32)
    x = rng.normal(size=(9, width))

    def logits(params):
        q_, k_ = (jnp.reshape(params[n], (width, -1, head_dim)) for n in "qk")
        keys = jnp.repeat(k_, num_heads // k_.shape[1], 1)
        return np.asarray(jnp.einsum("si,ihd,zj,jhd->hsz", x, q_, x, keys))

    merged = kind == "mha_merged"
    params = {n: w.reshape(width, -1) if merged else w for n, w in (("q", q), ("k", k))}
    power = 1.0 if kind == "gqa" else 0.5
    parts = {
        "q": QKPart(0, ((head_dim, power),), merged),
        "k": None if kind == "gqa" else QKPart(0, ((head_dim, power),), merged),
    }
    before = logits(params)
    largest = before.max((1, 2))
    tau = float(np.sort(largest)[-2] * 1.01)
    tx = qk_clip(tau, parts)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=largest[None])
    after = logits(optax.apply_updates(params, updates))
    np.testing.assert_allclose(after.max((1, 2)), np.minimum(largest, tau), rtol=1e-5)
    np.testing.assert_array_equal(after[largest <= tau], before[largest <= tau])


def test_part_that_does_not_fit_is_refused():
    tx = qk_clip(1.0, {"q": QKPart(0, ((5, 1.0),))})
    params = {"q": jnp.ones((8, 4, 6))}
    with pytest.raises(ValueError, match=r"parameter \(8, 4, 6\) .* must be \[layers\?, inputs, 4, 5\]"):
        tx.update(params, tx.init(params), params, max_logits=jnp.ones((1, 4)))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), None, "100"])
def test_a_tau_that_is_no_bound_is_refused(tau):
    """0 would make weights 0, and a negative one would make them NaN, without a word."""
    with pytest.raises(ValueError, match="tau = .*must be a number greater than 0"):
        qk_clip(tau, {"q": None})


def test_mistakes_of_the_call_are_named():
    params, parts = {"q": jnp.ones((8, 4, 6))}, {"q": QKPart(0, ((6, 1.0),))}
    tx = qk_clip(1.0, parts)
    for logits, given in ((None, "none"), (jnp.ones(4), r"shape \(4,\)"), (jnp.ones((1, 1, 4)), r"shape \(1, 1, 4\)")):
        with pytest.raises(ValueError, match=rf"needs max_logits \[layers, H\].*got {given}"):
            tx.update(params, tx.init(params), params, max_logits=logits)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params), max_logits=jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="parts are not shaped like the parameters"):
        tx.init({"q": params["q"], "k": params["q"]})
    for part in ((0, ((6, 1.0),)), QKPart(0, (6, 1.0)), QKPart(-2, ((6, 1.0),))):  # -2 would be the last layer but one
        with pytest.raises(ValueError, match=r"parts must be QKParts or None: \['q'\]"):
            qk_clip(1.0, {"q": part})


@pytest.mark.parametrize("merged", [False, True])
def test_biases_scale_with_their_heads(merged):
    """Queries and keys with biases, as Flax's attention has them by default, in float64: maxima are min(S, tau)."""
    rng = np.random.default_rng(0)
    heads = (4 * 6,) if merged else (4, 6)
    x = rng.normal(size=(7, 8))
    with jax.enable_x64(True):
        inputs = {"q": (8,), "k": (8,), "qb": (), "kb": ()}
        params = {n: jnp.asarray(rng.normal(size=(*size, *heads))) for n, size in inputs.items()}

        def largest(p):
            q, k = ((jnp.tensordot(x, p[n], 1) + p[n + "b"]).reshape(7, 4, 6) for n in "qk")
            return jnp.einsum("shd,zhd->hsz", q, k).max((1, 2))[None]

        parts = {n: QKPart(0, ((6, 0.5),), merged, 0 if n.endswith("b") else 1) for n in params}
        before = largest(params)
        tau = float(jnp.median(before))
        tx = qk_clip(tau, parts)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=before)
        after = largest(optax.apply_updates(params, updates))
        np.testing.assert_allclose(after, jnp.minimum(before, tau), rtol=1e-12)


def test_bfloat16_is_scaled_in_float32():
    """Parameters, updates or logits of bfloat16: what is rounded is the new weight, once, and not the factor."""
    params = {"q": jnp.asarray(np.random.default_rng(0).normal(size=(8, 1, 64)), jnp.bfloat16)}
    logits = jnp.asarray([[131.0]], jnp.bfloat16)
    np.testing.assert_allclose(clip_factors(logits, 100.0), 100 / 131, rtol=1e-7)
    tx = qk_clip(100.0, {"q": QKPart(0, ((64, 1.0),))})
    for dtype in (jnp.float32, jnp.bfloat16):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        updates, _ = tx.update(zeros, tx.init(params), params, max_logits=logits)
        new = optax.apply_updates(params, updates)["q"]
        assert updates["q"].dtype == dtype and new.dtype == jnp.bfloat16
        exact = np.asarray(params["q"], np.float64) * 100 / 131
        ratio = (np.asarray(new, np.float64) * exact).sum() / (exact**2).sum()
        assert ratio == pytest.approx(1, abs=5e-4)


def test_inside_masks_and_with_a_tau_that_is_set_while_training():
    """A part whose parameter is masked out is left alone; optax.inject_hyperparams traces tau."""
    params, zeros = {n: jnp.ones((8, 4, 6)) for n in "qk"}, {n: jnp.zeros((8, 4, 6)) for n in "qk"}
    parts, logits = {n: QKPart(0, ((6, 1.0),)) for n in "qk"}, jnp.array([[1.0, 200.0, 3.0, 4.0]])
    tx = optax.masked(qk_clip(100.0, parts), {"q": True, "k": False})
    updates, _ = tx.update(zeros, tx.init(params), params, max_logits=logits)
    assert updates["q"][0, 1, 0] == -0.5 and not updates["k"].any()
    tx = optax.inject_hyperparams(qk_clip)(tau=100.0, parts=parts)
    state = tx.init(params)
    state.hyperparams["tau"] = jnp.asarray(50.0)
    updates, _ = jax.jit(tx.update)(zeros, state, params, max_logits=logits)
    np.testing.assert_allclose(updates["k"][0, :, 0], [0, -0.75, 0, 0], rtol=1e-6)
