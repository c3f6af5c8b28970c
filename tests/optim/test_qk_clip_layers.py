"""After a clip every layer, recomputed on the inputs it had, has its logits at min(S, tau); the rest keeps its bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from k2jax.model import mla
from k2jax.model.rope import make_rope
from k2jax.model.transformer import make_positions
from k2jax.model.weights import Stack
from k2jax.optim import QKPart, qk_clip
from k2jax.optim.setup import map_weights

LAYERS, FIRST, TAU, TOKENS = 3, 1, 20.0, 11  # a stack that begins at layer 1 of the model


@pytest.fixture(params=[32, None], ids=["q_lora", "plain_q"])
def stack(request, tiny):
    """(declarations, float64 weights, function weights -> largest logits [LAYERS, H]) on recorded inputs."""
    config = dataclasses.replace(tiny, num_hidden_layers=FIRST + LAYERS, q_lora_rank=request.param)
    graph, state = nnx.split(mla.MLA(Stack(config, FIRST, LAYERS)))
    declared = nnx.to_pure_dict(jax.tree.map(lambda p: p.weight, state, is_leaf=lambda p: isinstance(p, nnx.Variable)))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(w.init == "ones", 0.2, w.shape) for name, w in declared.items()}
    x_LBTD = rng.normal(size=(LAYERS, 2, TOKENS, config.hidden_size))

    def max_logits(weights, dtype):
        index = jnp.broadcast_to(jnp.arange(TOKENS), (2, TOKENS))
        positions = make_positions(index, jnp.zeros_like(index), make_rope(config, "plain"))
        rows = []
        for layer in range(LAYERS):
            own = jax.tree.map(lambda w, layer=layer: jnp.asarray(w[layer], dtype), weights)
            rows.append(nnx.merge(graph, own)(jnp.asarray(x_LBTD[layer], dtype), positions)[1])
        return np.asarray(jnp.stack(rows))

    return declared, weights, max_logits


def spread_heads(weights, name):
    """Heads of very different size, other ones in every layer."""
    factor = np.random.default_rng(1).permuted(np.tile([0.3, 1.0, 4.0, 9.0], (LAYERS, 1)), axis=1)
    return weights | {name: weights[name] * factor[:, None, :, None]}


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_recomputed_logits(stack, dtype, bound):
    declared, weights, max_logits = stack
    query = "q_b" if "q_b" in weights else "q"
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda w: jnp.asarray(w, dtype), spread_heads(weights, query))
        before = max_logits(params, dtype)
        clipped = before > TAU
        assert clipped.any(1).all() and not clipped.all(1).any()  # some of every layer, never all
        every = np.concatenate([np.full((FIRST, before.shape[1]), 1e4, dtype), before])  # other layers' rows
        tx = qk_clip(TAU, map_weights(lambda w: w.qk and QKPart(w.first_layer, w.qk.powers), declared))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params, max_logits=jnp.asarray(every))
        after = max_logits(optax.apply_updates(params, updates), dtype)
        np.testing.assert_allclose(after[clipped], TAU, rtol=bound)
        np.testing.assert_array_equal(after[~clipped], before[~clipped])


def test_what_is_not_clipped_keeps_its_bits(stack):
    """An update that comes in for V, the shared rotary key, other projections or other heads goes out as it was."""
    declared, weights, max_logits = stack
    query, nope = "q_b" if "q_b" in weights else "q", declared["kv_b"].qk.powers[0][0]
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), spread_heads(weights, query))
    before = max_logits(params, "float32").copy()
    before[1, 0] = -before.max() * 50  # a head all of whose logits are negative, beside others over tau
    clipped = before > TAU
    rng = np.random.default_rng(2)
    incoming = jax.tree.map(lambda w: jnp.asarray(rng.normal(0, 0.01, w.shape), jnp.float32), params)
    tx = qk_clip(TAU, map_weights(lambda w: w.qk and QKPart(w.first_layer - FIRST, w.qk.powers), declared))
    outgoing, _ = jax.tree.map(np.asarray, tx.update(incoming, tx.init(params), params, max_logits=before))
    for name in params:
        same = outgoing[name] == np.asarray(incoming[name])
        if name == "kv_b":
            assert same[..., nope:].all()
            same = same[..., :nope]
        if name not in (query, "kv_b"):
            assert same.all(), name
            continue
        heads = np.moveaxis(same, 2, 1)  # [layers, H, inputs, last]
        assert heads[~clipped].all() and heads[clipped].mean() < 0.01, name
