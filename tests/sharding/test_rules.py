"""The table from dims to axes: what it refuses, and what it says of every declared weight."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim.muon import MatrixView, as_matrices, scale_by_muon
from k2jax.sharding.rules import spec, stored_spec, whole_matrix_specs


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
        for result in whole_matrix_specs(weight.shape[: weight.num_stack], weight.spec, mesh):
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
    # fsdp leaves the matrix for the 6 layers; tensor does not divide the 3 that remain and joins the experts
    assert whole_matrix_specs((6, 8), P(None, "expert", "fsdp", None), mesh) == (
        P("fsdp", "expert", None, None),
        P("fsdp", ("expert", "tensor"), None, None),
    )
    assert whole_matrix_specs((3,), P(None, "fsdp", None), mesh) == (P(None, None, None), P(None, None, None))


def test_newton_schulz_moves_no_whole_stack(mesh_of):
    """From experts cut inside their matrices to whole ones: all that is gathered is the way back from tensor."""
    mesh, at_rest = mesh_of(fsdp=2, expert=2, tensor=2), P(None, "expert", "fsdp", None)
    view = MatrixView(2, 1, whole_matrix_specs((3, 8), at_rest, mesh))
    tx = scale_by_muon(view)

    def update(grad):
        return tx.update(grad, tx.init(grad))[0]

    with jax.set_mesh(mesh):
        grad = jax.device_put(np.ones((3, 8, 16, 32), np.float32), jax.NamedSharding(mesh, at_rest))
        compiled = jax.jit(jax.sharding.auto_axes(update, out_sharding=at_rest)).lower(grad).compile()
    collectives = re.findall(
        r"= f32\[([\d,]+)\]\S* (all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text()
    )
    gathered = [math.prod(map(int, shape.split(","))) for shape, kind in collectives if kind != "all-to-all"]
    assert collectives and max(gathered, default=0) <= 3 * 8 * 16 * 32 // 4  # what a device holds at rest
