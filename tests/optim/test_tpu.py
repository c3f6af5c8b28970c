"""The update of Kimi K2 at full size, compiled for TPU v5p by libtpu on a machine without one: `make test-tpu`."""

import time

import pytest
from compiled import assert_only_exchanges, compile_update

from k2jax.config import Config, MeshConfig
from k2jax.plan.aot import expected_exchanges
from k2jax.plan.muon_work import describe_assignments
from k2jax.plan.topology import topology_mesh

pytestmark = pytest.mark.tpu

MAX_TEMP_GIB = 1.5


@pytest.mark.parametrize(
    ("topology", "axes", "off"),
    # 256 devices hold 28 rows of a matrix each, which the TPU pads to its tiles.
    [("v5p:8x8x16", {"fsdp": 16, "expert": 64}, 0.2), ("v5p:16x16x16", {"fsdp": 256, "expert": 16}, 0.35)],
    ids=["v5p-8x8x16", "v5p-16x16x16"],
)
def test_k2_update_on_v5p(topology, axes, off, capsys):
    """Float32 state, bf16 Newton-Schulz: each matrix whole on one chip, and memory for one leaf at a time."""
    config = Config(mesh=MeshConfig(**axes))
    mesh = topology_mesh(config.mesh, topology)
    started = time.monotonic()
    compiled = compile_update(config, mesh)
    temp = compiled.memory_analysis().temp_size_in_bytes
    estimate = describe_assignments(config)["temp_bytes"]
    with capsys.disabled():
        took = time.monotonic() - started
        print(
            f"\n{topology}: compiled in {took:.0f} s, temp {temp / 2**30:.2f} GiB, estimate {estimate / 2**30:.2f} GiB"
        )
    assert_only_exchanges(compiled.as_text(), mesh, expected_exchanges(config, mesh.shape))
    assert temp < MAX_TEMP_GIB * 2**30
    assert estimate == pytest.approx(temp, rel=off)  # k2jax inspect's
