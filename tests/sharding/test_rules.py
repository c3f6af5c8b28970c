"""The table from dims to axes: what it refuses, and what it says of every declared weight."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.sharding.rules import spec, stored_spec


def declared(config):
    pairs = jax.tree_util.tree_leaves_with_path(declarations(config), is_leaf=lambda x: isinstance(x, Weight))
    return {jax.tree_util.keystr(path, simple=True, separator="."): weight for path, weight in pairs}


def axes_of(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def test_unknown_dim_is_refused_and_named():
    with pytest.raises(ValueError, match=r"unknown dims \['!'\] in 'BT!'; known: .*hidden_size"):
        spec("BT!")


@pytest.mark.parametrize("dims", ["TH", "BE", "TS", "BB"])
def test_collision_is_refused_and_printed(dims):
    with pytest.raises(ValueError, match=f"dims '{dims}' use a mesh axis twice: {{'{dims[0]}'"):
        spec(dims)


def test_specs_in_use_are_those_of_the_docstring():
    assert spec("BTD") == P(("replica", "fsdp", "expert"), ("context", "tensor"), None)
    assert spec("BSHK") == P(("replica", "fsdp", "expert"), "context", "tensor", None)
    assert spec("BZHK") == P(("replica", "fsdp", "expert"), None, "tensor", None)
    assert spec("EDF") == P("expert", None, None)


def test_specs_at_rest_by_hand():
    assert stored_spec("LEDF", "DF") == P(None, "expert", "fsdp", None)
    assert stored_spec("LHUD", "HUD") == P(None, "tensor", None, "fsdp")
    assert stored_spec("LQHK", "QHK") == P(None, "fsdp", "tensor", None)
    assert stored_spec("LD", "") == P(None, None)


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(n_shared_experts=2)], ids=["k2", "other"])
def test_every_weight_at_rest(config):
    """No axis twice (jax refuses such a spec only in use), and every matrix, so nearly all bytes, cut over fsdp."""
    for name, weight in declared(config).items():
        axes = [axis for entry in weight.spec for axis in axes_of(entry)]
        assert len(weight.spec) == len(weight.shape), name
        assert len(axes) == len(set(axes)), name
        assert ("fsdp" in axes) == bool(weight.inputs), name
    assert "expert" in [a for e in declared(config)["moe.ffn.gate"].spec for a in axes_of(e)]
