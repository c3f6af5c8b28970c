"""Decoding over the latent cache gives the logits of the plain forward pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import STRETCHED, make_values

from k2jax.config import ModelConfig
from k2jax.model.transformer import Transformer, bias_declarations, build_model, declarations
from k2jax.model.weights import Weight


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def advance(config, rope, values, tokens, start, last, cache):
    dtype = jax.tree.leaves(values)[0].dtype
    return build_model(config, *values, dtype, rope=rope).decode(tokens, start, last, cache)


def by_steps(config, rope, values, rows, dtype):
    """Logits [B, T, V] of rows of unequal lengths: a padded prefill of 5, 3 and 1 tokens, then one token at a time."""
    firsts, longest = np.array([5, 3, 1]), max(map(len, rows))
    cache = build_model(config, *values, dtype).init_cache(3, longest + 4)
    padded = np.full((3, 8), 7, np.int32)  # what lies beyond the prompt is a token like any other
    for row, tokens, first in zip(padded, rows, firsts, strict=True):
        row[:first] = tokens[:first]
    logits, cache = advance(config, rope, values, padded, np.zeros(3, np.int32), firsts - 1, cache)
    found, lengths = [[row] for row in np.asarray(logits)], firsts.copy()
    while (lengths < [len(row) for row in rows]).any():
        newest = np.array([[row[min(n, len(row) - 1)]] for row, n in zip(rows, lengths, strict=True)], np.int32)
        logits, cache = advance(config, rope, values, newest, lengths, np.zeros(3, np.int32), cache)
        for list_, row in zip(found, np.asarray(logits), strict=True):
            list_.append(row)
        lengths += 1
    return found, firsts


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, "plain"),
        ({"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 0}, "plain"),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "rope": STRETCHED}, "yarn"),
        ({"first_k_dense_replace": 3}, "plain"),
    ],
    ids=["k2", "moonlight", "deepseek", "all_dense"],
)
def test_cached_and_uncached_logits_agree(tiny, changes, rope):
    """In float64, to 1e-9 of the largest: the absorbed form is the same sum in another order."""
    config = dataclasses.replace(tiny, **changes)
    rng = np.random.default_rng(0)
    values = make_values(config, rng)
    rows = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (14, 9, 7)]
    with jax.enable_x64(True):
        values = jax.tree.map(jnp.asarray, values)
        found, firsts = by_steps(config, rope, values, rows, jnp.dtype("float64"))
        for tokens, first, logits in zip(rows, firsts, found, strict=True):
            whole = build_model(config, *values, jnp.dtype("float64"), rope=rope)(tokens[None]).logits[0]
            count = len(tokens) - first + 1
            np.testing.assert_allclose(logits[:count], whole[first - 1 :], rtol=0, atol=1e-9 * np.abs(whole).max())


def test_cache_holds_576_values_a_token_and_layer():
    """K2's shape (k2-facts 3.1): 70,272 bytes a token in bf16 over 61 layers."""
    cache = jax.eval_shape(lambda: Transformer(ModelConfig(), jnp.dtype("bfloat16")).init_cache(1, 1))
    assert sum(x.size for x in jax.tree.leaves(cache)) == 61 * 576
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == 70_272


def test_decoding_on_a_mesh(tiny, mesh_of):
    """In float64, to 1e-9 of the largest logit of decoding without a mesh.

    Prompts of 8 are cut over tensor, single tokens are not, and of 12 slots or more each device has half.
    """
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda x: np.asarray(x, np.float64), make_values(tiny, rng))
    rows = [rng.integers(0, tiny.vocab_size, n).astype(np.int32) for n in (7, 6, 4)]
    with jax.enable_x64(True):
        alone, _ = by_steps(tiny, "plain", jax.tree.map(jnp.asarray, values), rows, jnp.dtype("float64"))
        mesh = mesh_of(tensor=2)
        declared = declarations(tiny), bias_declarations(tiny)
        is_weight = {"is_leaf": lambda x: isinstance(x, Weight)}
        layouts = jax.tree.map(lambda w: jax.NamedSharding(mesh, w.spec(mesh.shape)), declared, **is_weight)
        with jax.set_mesh(mesh):
            spread, _ = by_steps(tiny, "plain", jax.device_put(values, layouts), rows, jnp.dtype("float64"))
    assert np.abs(np.array(spread) - np.array(alone)).max() <= 1e-9 * np.abs(alone).max()


def test_no_device_writes_slots_of_another(tiny, mesh_of):
    """A prefill of 8 into 12 slots over tensor 2 leaves the last 4 as they were."""
    values = jax.tree.map(lambda x: np.asarray(x, np.float32), make_values(tiny, np.random.default_rng(2)))
    with jax.set_mesh(mesh_of(tensor=2)):
        values = jax.device_put(values, jax.P())
        cache = jax.jit(lambda v: build_model(tiny, *v, jnp.dtype("float32")).init_cache(1, 12))(values)
        tokens, zero = np.arange(8, dtype=np.int32)[None], np.zeros(1, np.int32)
        _, cache = advance(tiny, "plain", values, tokens, zero, zero + 7, cache)
    for latents in jax.tree.leaves(cache):
        assert np.asarray(latents)[:, :, :8].all() and not np.asarray(latents)[:, :, 8:].any()
