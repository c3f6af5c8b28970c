"""What the compiled optimizer update of the whole model communicates: all-to-all in and out, and the norm."""

import pytest
from compiled import Collective, assert_only_exchanges, collectives, compile_update, expected_exchanges

from k2jax.config import Config, OptimConfig

MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "expert": 4}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_whole_update_only_exchanges(tiny, axes, mesh_of):
    """Of all weights, Muon's and AdamW's, with the global norm, decay and QK-Clip."""
    config = Config(model=tiny, optim=OptimConfig(ns_dtype="float32"))
    mesh = mesh_of(**axes)
    text = compile_update(config, mesh, xla_backend_optimization_level=0).as_text()
    assert_only_exchanges(text, expected_exchanges(config, mesh))


MODULE = """\
%body.1 (p: f32[2]) -> f32[2] {
  %g = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner.2
}

%inner.2 (p: f32[2]) -> f32[4] {
  ROOT %a = f32[4]{0} all-gather(%p), dimensions={0}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %r = (f32[], f32[]) all-reduce(%x, %y), to_apply=%add
  %m = f32[8]{0} all-reduce-start(%x), to_apply=%add
  %w = f32[2]{0} while(%p), condition=%cond.3, body=%body.1
}

%cond.3 (p: f32[2]) -> pred[] {
}

%add (p: f32[], q: f32[]) -> f32[] {
}
"""


def test_reading_of_hlo():
    """By hand: a gather in a fusion in a loop, two scalars reduced at once, and a matrix that is reduced."""
    gather, scalars, matrix = collectives(MODULE)
    assert gather == Collective("all-gather", "f32[4]{0}", True)
    assert (scalars.is_scalar, scalars.repeated) == (True, False)
    assert (matrix.kind, matrix.is_scalar) == ("all-reduce", False)
    with pytest.raises(AssertionError):
        assert_only_exchanges(MODULE, 0)
