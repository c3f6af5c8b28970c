"""The update of Kimi K2 at full size, compiled for TPU v5p by libtpu on a machine without one: `make test-tpu`."""

import math
import time

import jax
import numpy as np
import pytest
from compiled import assert_only_exchanges, compile_update, expected_exchanges
from jax.experimental import topologies
from jax.sharding import AxisType

from k2jax.config import Config, MeshConfig
from k2jax.sharding.names import AXES
from k2jax.train.plan_table import describe_plan

pytestmark = pytest.mark.tpu

MAX_TEMP_GIB = 1.5
# libtpu must not look for the machine that it is told to compile for
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("v5p:8x8x16", {"fsdp": 16, "expert": 64}), ("v5p:16x16x16", {"fsdp": 64, "expert": 64})],
    ids=["v5p-8x8x16", "v5p-16x16x16"],
)
def test_k2_update_on_v5p(topology, axes, monkeypatch, capsys):
    """Float32 state, bf16 Newton-Schulz: each matrix whole on one chip, and memory for one leaf at a time."""
    for name, value in NO_TPU_HERE.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = Config(mesh=MeshConfig(**axes))
    shape = tuple(getattr(config.mesh, axis) for axis in AXES)
    assert math.prod(shape) == len(devices)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    started = time.monotonic()
    compiled = compile_update(config, mesh)
    temp = compiled.memory_analysis().temp_size_in_bytes
    estimate = describe_plan(config)["temp_bytes"]
    with capsys.disabled():
        took = time.monotonic() - started
        print(
            f"\n{topology}: compiled in {took:.0f} s, temp {temp / 2**30:.2f} GiB, estimate {estimate / 2**30:.2f} GiB"
        )
    assert_only_exchanges(compiled.as_text(), expected_exchanges(config, mesh))
    assert temp < MAX_TEMP_GIB * 2**30
    assert estimate == pytest.approx(temp, rel=0.2)  # k2jax inspect's
