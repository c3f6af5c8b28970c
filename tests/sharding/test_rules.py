"""The table from dims to axes: what it refuses, and what it says of every declared weight."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim.muon import MatrixView, as_matrices
from k2jax.sharding.rules import spec, stored_spec, whole_matrix_spec


def declared(config):
    pairs = jax.tree_util.tree_leaves_with_path(declarations(config), is_leaf=lambda x: isinstance(x, Weight))
    return {jax.tree_util.keystr(path, simple=True, separator="."): weight for path, weight in pairs}


def axes_of(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def matrix_shape(weight):
    view = MatrixView(weight.num_stack, weight.num_inputs)
    return jax.eval_shape(lambda x: as_matrices(x, view), jax.ShapeDtypeStruct(weight.shape, "float32")).shape


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


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"replica": 4, "context": 2}], ids=str
)
def test_whole_matrices(tiny, mesh_of, axes):
    """Newton-Schulz needs matrix dims whole; stack dims are cut evenly, and experts stay on the axis that owns them."""
    mesh = mesh_of(**axes)
    for name, weight in declared(tiny).items():
        shape = matrix_shape(weight)
        if weight.group != "muon":
            continue
        result = whole_matrix_spec(shape, weight.num_stack, mesh, weight.spec)
        assert len(result) == len(shape) == weight.num_stack + 2, name
        assert result[-2:] == (None, None), name
        used = [axes_of(entry) for entry in result]
        assert len(sum(used, ())) == len(set(sum(used, ()))), name
        for size, cut in zip(shape, used, strict=True):
            assert size % math.prod(mesh.shape[a] for a in cut) == 0, name
        if weight.stack == "LE":
            assert used[1][0] == "expert", name


def test_whole_matrices_by_hand(mesh_of):
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    # 6 layers take fsdp (6 -> 3), not tensor (3 is odd); 8 experts, cut over expert, take tensor
    experts = whole_matrix_spec((6, 8, 5, 7), 2, mesh, P(None, "expert", "fsdp", None))
    assert experts == P("fsdp", ("expert", "tensor"), None, None)
    assert whole_matrix_spec((3, 5, 7), 1, mesh, P(None, "fsdp", None)) == P(None, None, None)
