"""Declarations against the published counts; initial values that depend on nothing but seed and name."""

import functools
from functools import partial

import jax
import numpy as np
import pytest

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations, init_router_bias
from k2jax.model.weights import Weight, init_params


def leaves(config):
    return jax.tree.leaves(declarations(config), is_leaf=lambda x: isinstance(x, Weight))


def by_component(weights):
    """{component: parameters}"""
    totals = {}
    for w in weights:
        totals[w.component] = totals.get(w.component, 0) + w.size
    return totals


def test_k2_has_the_parameters_of_its_checkpoint():
    """k2-facts 1.3, counted there from the published checkpoint's map; latent norms are in `norms`, as there."""
    weights = leaves(ModelConfig())
    num_bias = sum(b.size for b in jax.tree.leaves(jax.eval_shape(lambda: init_router_bias(ModelConfig()))))
    assert num_bias == 60 * 384
    assert sum(w.size for w in weights) + num_bias == 1_026_408_232_448
    assert by_component(weights) == {
        "embedding": 1_174_405_120,
        "head": 1_174_405_120,
        "attention": 6_168_444_928,
        "dense ffn": 396_361_728,
        "routed experts": 1_014_686_023_680,
        "shared experts": 2_642_411_520,
        "router": 165_173_760 - num_bias,
        "norms": 1_006_592,
    }


def test_deepseek_v3_has_the_parameters_of_its_checkpoint():
    """k2-facts 1.3: the main model, without the multi-token layer; checks that no K2 size is written into the model."""
    config = ModelConfig(vocab_size=129_280, first_k_dense_replace=3, num_attention_heads=128, n_routed_experts=256)
    assert sum(w.size for w in leaves(config)) + 58 * 256 == 671_026_419_200


@partial(jax.jit, static_argnums=(0, 2))
def make(config, key, part=None):
    """Initial values of all weights, or of `part` alone with the names it has in the whole."""
    weights = declarations(config)
    if part == "experts":
        ffn = weights["moe"]["ffn"]
        weights = {"head": weights["head"], "moe": {"ffn": {"router": ffn["router"], "up": ffn["up"]}}}
    return init_params(weights, key, 0.02)


def values(config, seed=0, part=None):
    return jax.device_get(make(config, jax.random.key(seed), part))


def assert_part_of(some, full, rtol=0.0):
    for path, value in jax.tree_util.tree_leaves_with_path(some):
        full_value = functools.reduce(lambda tree, entry: tree[entry.key], path, full)
        np.testing.assert_allclose(value, full_value, rtol=rtol, err_msg=jax.tree_util.keystr(path))


def test_initial_values_do_not_depend_on_other_weights(tiny):
    assert_part_of(values(tiny, part="experts"), values(tiny))


def test_initial_values_are_the_same_on_every_mesh(tiny, mesh_of):
    """To the last bit but one: the random bits are the same, XLA's vector code for N(0, 1) depends on local sizes."""
    for axes in ({"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 8}):
        with jax.set_mesh(mesh_of(**axes)):
            spread = make(tiny, jax.random.key(0), "experts")
            assert not spread["moe"]["ffn"]["up"].sharding.is_fully_replicated
        assert_part_of(jax.device_get(spread), values(tiny), rtol=2.5e-7)


def test_initial_distribution(tiny):
    """Every matrix has its own draw of N(0, std); every gain is one; the seed counts."""
    drawn = {}
    for path, w in jax.tree_util.tree_leaves_with_path(values(tiny)):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert (w == 1).all(), name
        else:
            # the sample deviation of n draws is known to 1 / sqrt(2 n); five of those
            assert np.std(w) == pytest.approx(0.02, rel=5 / np.sqrt(2 * w.size)), name
            drawn[name] = np.asarray(w).ravel()[:8]
    firsts = np.stack(list(drawn.values()))
    assert len(np.unique(firsts)) == firsts.size
    assert not np.array_equal(values(tiny, seed=1)["head"], values(tiny)["head"])
