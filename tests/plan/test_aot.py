"""A whole step planned for a mesh of this machine's CPU devices, where what was planned can be looked at."""

import json

import jax
import pytest

from k2jax.config import Config, DataConfig, MeshConfig, TrainConfig
from k2jax.errors import RunFailed
from k2jax.plan import aot
from k2jax.sharding.mesh import make_mesh
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import init_state


def bytes_on_first_device(tree) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


def test_plan_of_a_small_model(tiny):
    config = Config(
        model=tiny,
        data=DataConfig(sequence_length=16, batch_sequences=16),
        mesh=MeshConfig(fsdp=2, expert=2),
        train=TrainConfig(num_microbatches=2, compute_dtype="float32"),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    found = json.loads(json.dumps(aot.describe_step(config, mesh, {"xla_backend_optimization_level": "0"})))
    with jax.set_mesh(mesh):
        state = init_state(config, make_optimizer(config, mesh))
    memory = found["memory"]
    assert memory["parameters"] == memory["gradients"] == bytes_on_first_device(state.params)
    assert memory["optimizer_state"] == bytes_on_first_device(state.opt_state)
    assert memory["batch"] == 4 * 4 * 16 * 16 // 4  # four int32 arrays, sequences over 4
    kinds = ("parameters", "optimizer_state", "other_state", "batch")
    assert memory["arguments"] == pytest.approx(sum(memory[kind] for kind in kinds), rel=0.01)
    assert memory["temp"] == memory["gradients"] + memory["activations"] and memory["activations"] > 0
    assert memory["outputs"] < memory["parameters"] / 10, "the state is not donated"
    assert found["tokens_per_device_and_microbatch"] == 32

    assert found["optimizer_beyond_exchanges"] == []
    table = {(row["part"], row["kind"], tuple(row["axes"])): row for row in found["communication"]}
    assert table["forward", "all-to-all", ("expert",)]["runs"] % (2 * 2) == 0  # microbatches, MoE layers
    exchanges = sum(row["runs"] for key, row in table.items() if key[:2] == ("optimizer", "all-to-all"))
    assert exchanges == aot.expected_exchanges(config, mesh.shape) > 0
    assert found["kernels"][1] == "experts: exchange dense x 2, room for all rows; grouped matmul blocked"
    text = "\n".join(aot.plan_lines(found))
    assert found["kernels"][0] in text and "\ncompiler: no options\n" in text
    assert "fsdp 2 x expert 2;" in text and "all-to-all and nothing else" in text
    assert (set(found["slices"].values()), found["hosts"]) == ({1}, [])
    text = "\n".join(aot.plan_lines(found | {"hosts": ["slice 0  replica 0"], "optimizer_beyond_exchanges": None}))
    assert "\nslice 0  replica 0\n" in text and "matrices: not told for several slices: plan one" in text


def test_a_program_that_jax_cannot_read_is_said():
    """As of libtpu 0.0.52 by jax 0.10.2."""

    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update\nstack")

    with pytest.raises(RunFailed, match=r"cannot read the program .*async-update\); jax 0.11.2 can: use Python 3.12$"):
        aot.program_text(Compiled())


def test_what_does_not_fit_is_said(monkeypatch):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")

    with pytest.raises(RunFailed, match="does not fit: RESOURCE_EXHAUSTED"):
        aot.compile_step(Lowered())


def test_a_plan_ends_where_a_device_has_not_the_memory(tiny, monkeypatch):
    """XLA compiles for GPUs, and for CPUs, what a device has no room for."""
    mesh, memory = make_mesh(MeshConfig(), jax.devices()[:1]), {"arguments": 2**30, "temp": 2**30, "total": 2**31}
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(aot, "lower_step", lambda config, mesh: (jax.jit(lambda x: x).lower(0.0), None))
    monkeypatch.setattr(aot, "memory_by_kind", lambda *_: memory | {"outputs": 0, "program": 0})
    monkeypatch.setitem(aot.MEMORY_BYTES, kind, 2**30)
    with pytest.raises(RunFailed, match=rf"^does not fit: used 2.00G of 1.00G of {kind}: .*; exceeded by 1.00G$"):
        aot.describe_step(Config(model=tiny), mesh)
