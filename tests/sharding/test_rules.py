"""The table from dims to axes: what it refuses, and what it says of every declared weight."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.sharding.names import AXES
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


def at_rest(dims, matrix_dims, shape, **axes):
    return stored_spec(dims, matrix_dims, shape, dict.fromkeys(AXES, 1) | axes)


def test_specs_at_rest_by_hand():
    """K2's: what is in use stays, fsdp next, then the first dim of the matrix that the rest of the mesh divides."""
    many = {"fsdp": 16, "expert": 64}
    assert at_rest("LEDF", "DF", (60, 384, 7168, 2048), **many) == P(None, "expert", "fsdp", None)
    assert at_rest("LDJ", "DJ", (60, 7168, 576), **many) == P(None, ("fsdp", "expert"), None)
    # 112 rows of 7168 / 64 are no multiple of 64, but 576 columns are
    assert at_rest("LDJ", "DJ", (60, 7168, 576), fsdp=64, expert=64) == P(None, "fsdp", "expert")
    assert at_rest("LHUD", "HUD", (60, 64, 128, 7168), **many) == P(None, ("tensor", "expert"), None, "fsdp")
    # with tensor 2 the 32 heads left are no multiple of 64
    assert at_rest("LHUD", "HUD", (60, 64, 128, 7168), **many, tensor=2) == P(None, "tensor", "expert", "fsdp")
    assert at_rest("LQHK", "QHK", (60, 1536, 64, 192), fsdp=8, expert=2) == P(None, ("fsdp", "expert"), "tensor", None)
    assert at_rest("LEDF", "DF", (60, 384, 7168, 2048), fsdp=2, expert=2, tensor=2, context=2) == P(
        None, "expert", ("fsdp", "tensor", "context"), None
    )
    assert at_rest("ID", "ID", (50, 48), fsdp=2, expert=4) == P(None, ("fsdp", "expert"))
    assert at_rest("ID", "ID", (50, 42), fsdp=2, expert=4) == P(None, "fsdp")  # nothing to divide by 4: copied
    assert at_rest("LD", "", (60, 7168), **many) == P(None, None)
    assert at_rest("LEDF", "DF", (60, 384, 7168, 2048), replica=2) == P(None, "expert", "fsdp", None)
    # stages have whole layers where their number allows it, else parts of a matrix as any other axis
    assert at_rest("LEDF", "DF", (60, 384, 7168, 2048), stage=15, fsdp=8) == P("stage", "expert", "fsdp", None)
    assert at_rest("LD", "", (60, 7168), stage=15) == P("stage", None)
    assert at_rest("LDF", "DF", (1, 7168, 18432), stage=16, fsdp=8) == P(None, ("fsdp", "stage"), None)
    assert at_rest("DV", "DV", (7168, 163840), stage=4, expert=16) == P(("fsdp", "stage", "expert"), "tensor")
    assert at_rest("LD", "", (1, 7168), stage=16) == P(None, None)


K2_MESHES = [{"fsdp": 16, "expert": 64}, {"fsdp": 64, "expert": 64}, {"fsdp": 32, "expert": 32, "tensor": 2}]


@pytest.mark.parametrize("axes", K2_MESHES, ids=str)
@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(n_shared_experts=2)], ids=["k2", "other"])
def test_every_weight_at_rest(config, axes):
    """No axis twice (jax refuses such a spec only in use), no matrix twice in a replica, and every cut is even."""
    sizes = dict.fromkeys(AXES, 1) | axes
    for name, weight in declared(config).items():
        entries = [axes_of(entry) for entry in weight.spec(sizes)]
        used = [axis for entry in entries for axis in entry]
        assert len(entries) == len(weight.shape), name
        assert len(used) == len(set(used)), name
        assert not weight.inputs or set(axes) <= set(used), name
        assert "replica" not in used and (weight.inputs or not used), name
        for size, entry in zip(weight.shape, entries, strict=True):
            assert size % math.prod(sizes[axis] for axis in entry) == 0, name
    assert "expert" in [a for e in declared(config)["moe.ffn.gate"].spec(sizes) for a in axes_of(e)]
