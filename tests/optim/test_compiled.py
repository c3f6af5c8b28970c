"""Communication of the compiled optimizer update of the whole model: all-to-all in and out, and the norm."""

import pytest
from compiled import assert_only_exchanges, compile_update

from k2jax.config import Config, OptimConfig
from k2jax.plan.aot import expected_exchanges

MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "expert": 4}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_whole_update_only_exchanges(tiny, axes, mesh_of):
    """Of all weights, Muon's and AdamW's, with the global norm, decay and QK-Clip."""
    config = Config(model=tiny, optim=OptimConfig(ns_dtype="float32"))
    mesh = mesh_of(**axes)
    text = compile_update(config, mesh).as_text()
    assert_only_exchanges(text, mesh, expected_exchanges(config, mesh.shape))
