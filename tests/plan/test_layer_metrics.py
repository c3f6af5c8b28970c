"""Figures of a layer and microbatch: of a loop written by hand at Kimi K2's size, and of two compiled programs."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from k2jax.config import Config, DataConfig, MeshConfig, TrainConfig
from k2jax.errors import UserError
from k2jax.plan.chips import Chip, Network, Ring
from k2jax.plan.layer_metrics import LayerMetrics, moe_flops_per_token
from k2jax.plan.layer_program import lower_layers
from k2jax.plan.program import Program
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.names import AXES
from k2jax.train.compile_step import lower_step

K2 = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "k2_1t.py"))["config"]()
EXPERT = "replica_groups=mesh['fsdp'=16,'expert'=64] {'expert'}"
FSDP = "replica_groups=mesh['fsdp'=16,'expert'=64] {'fsdp'}, dimensions={0}"
NAME = 'metadata={op_name="jit(f)/jvp(layers)/while/body/ffn/shard_map/experts/x"}'
ATTENTION = 'metadata={op_name="jit(f)/jvp(layers)/while/body/attention/shard_map/x"}'
ROWS, ROOM, GATHERED = "bf16[131072,2,3584]{2,1,0}", "bf16[196608,2,3584]{2,1,0}", "bf16[6,7168,2048]{2,1,0}"
LOOP = f"""\
%mask (x: bf16[196608,7168]) -> bf16[196608,7168] {{
  %x = bf16[196608,7168]{{1,0}} parameter(0)
  ROOT %y = bf16[196608,7168]{{1,0}} multiply(%x, %x)
}}

%body (t: (s32[])) -> (s32[]) {{
  %t = (s32[]) parameter(0)
  %sent = {ROWS} get-tuple-element(%t), index=0
  %zero = bf16[]{{:S(6)}} constant(0)
  %fill = {ROOM} broadcast(%zero), dimensions={{}}, {NAME}
  %out = {ROOM} ragged-all-to-all(%sent, %fill, %t, %t, %t, %t), {EXPERT}, {NAME}
  %rows = bf16[196608,7168]{{1,0}} bitcast(%out)
  %masked = bf16[196608,7168]{{1,0}} fusion(%rows), kind=kLoop, calls=%mask, {NAME}
  %weights = {GATHERED} all-gather(%t), {FSDP}, {NAME}
  %few = bf16[6,64,2048]{{2,1,0}} all-gather(%t), {FSDP}, {NAME}
  %dot = bf16[196608,2048]{{1,0}} custom-call(%t, %masked, %weights), custom_call_target="tpu_custom_call", \
frontend_attributes={{ragged_dot_tiling="128,7168,512"}}, {NAME}
  %start = ({ROOM}, {ROWS}) ragged-all-to-all-start(%out, %sent, %t, %t, %t, %t), {EXPERT}, {NAME}
  %logits = f32[4,64,256,256]{{3,2,1,0}} broadcast(%zero), dimensions={{}}, {ATTENTION}
  %held = f32[4,64,256,256]{{3,2,1,0:S(1)}} broadcast(%zero), dimensions={{}}, {ATTENTION}
  %queries = bf16[4,64,4096,192]{{3,2,1,0}} broadcast(%zero), dimensions={{}}, {ATTENTION}
  %back = {ROWS} ragged-all-to-all-done(%start)
  ROOT %next = (s32[]) tuple(%t)
}}

%condition (t: (s32[])) -> pred[] {{
  %t = (s32[]) parameter(0)
  ROOT %go = pred[] custom-call(%t), custom_call_target="X"
}}

ENTRY %main (t: (s32[])) -> (s32[]) {{
  %t = (s32[]) parameter(0)
  %far = {ROOM} broadcast(%t), dimensions={{}}
  ROOT %w = (s32[]) while(%t), condition=%condition, body=%body, metadata={{op_name="jit(f)/jvp(layers)/while"}}, \
backend_config={{"known_trip_count":{{"n":"60"}}}}
}}
"""
SIZES = dict.fromkeys(AXES, 1)


def network(sizes, rings):
    return Network(Chip(459e12, 2.765e12, 9e10), rings, SIZES, SIZES | sizes)


V5P = network({"fsdp": 16, "expert": 64}, {"fsdp": (Ring(16, True),), "expert": (Ring(8, True), Ring(8, True))})


def test_by_hand():
    found = LayerMetrics(Program(LOOP, K2, V5P)).describe()
    rows, width = 131_072, 7168
    exchange, gather = rows * width * 2 / 9e10, 6 * width * 2048 * 2 * 15 / 16 / 18e10
    room = 196_608 * width * 2  # bytes of the buffer
    logits, queries = 4 * 64 * 256 * 256 * 4, 4 * 64 * 4096 * 192 * 2
    assert found["runs"] == 60 and found["crossings"] == 2
    assert found["synchronous_collectives"] == 2  # the exchange out and the weights; not the few
    assert found["quadratic_attention_bytes"] == logits  # one chunk is in VMEM, and the queries are no logits
    assert found["row_bytes"] == room + 2 * room  # the fill, the mask
    assert found["flops"] == 2 * rows * width * 2048
    read = 4 * rows * width * 2 + 6 * width * 2048 * 2 + rows * 2048 * 2  # four tiles of columns
    assert found["hbm_bytes"] == pytest.approx(3 * room + read + logits + queries)
    useful = found["flops"] / 459e12
    assert found["ragged_dot_over_useful"] == pytest.approx(max(useful, read / 2.765e12) / useful)
    few = gather * 64 / width
    between = (logits + queries) / 2.765e12
    assert found["communication_seconds"] == pytest.approx(2 * exchange + gather + few)
    assert found["exposed_seconds"] == pytest.approx(exchange + gather + few + exchange - between)
    core = 3 * room / 2.765e12 + max(useful, read / 2.765e12) + between
    assert found["seconds"] == pytest.approx(core + found["exposed_seconds"])


def test_the_model_s_flops():
    """6 per weight of attention, router, shared and eight routed experts, and causal attention's own, of one layer."""
    attention = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168
    weights = attention + 7168 * 384 + 9 * 3 * 7168 * 2048
    assert moe_flops_per_token(K2) == pytest.approx(6 * weights + 3 * 64 * (192 + 128) * 4096, rel=1e-4)


def test_a_program_without_layers():
    with pytest.raises(ValueError, match="no loop over MoE layers"):
        LayerMetrics(Program(LOOP.replace("jvp(layers)/while", "jvp(other)/while"), K2, V5P))


def small(tiny, **changes) -> Config:
    return Config(
        model=dataclasses.replace(tiny, num_hidden_layers=5, **changes),
        data=DataConfig(sequence_length=16, batch_sequences=48),
        mesh=MeshConfig(fsdp=2, expert=2),
        train=TrainConfig(num_microbatches=3, compute_dtype="float32"),
    )


@pytest.mark.grid  # compiles two programs of five layers; libtpu's, of a small model: test_layers_tpu.py
def test_layers_alone_have_the_step_s_figures(tiny):
    """Four layers and three microbatches of a step compiled for this machine, and the same layers by themselves."""
    config = small(tiny)
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    of_mesh = network({"fsdp": 2, "expert": 2}, {"fsdp": (Ring(2, False),), "expert": (Ring(2, False),)})
    options = {"xla_backend_optimization_level": "0"}
    step, layers = (
        LayerMetrics(Program(lowered.compile(compiler_options=options).as_text(), config, of_mesh)).describe()
        for lowered in (lower_step(config, mesh)[0], lower_layers(config, mesh))
    )
    assert (step.pop("runs"), layers.pop("runs")) == (4 * 3, 4)
    for key in ("flops", "crossings", "communication_seconds"):
        assert layers[key] == pytest.approx(step[key], rel=0.005), key
    for key in ("hbm_bytes", "seconds"):
        assert layers[key] == pytest.approx(step[key], rel=0.05), key
    assert step["flops"] > 0 and step["communication_seconds"] > 0


def test_layers_that_cannot_be_alone(tiny):
    config = small(tiny, first_k_dense_replace=5)
    config = dataclasses.replace(config, mesh=MeshConfig(stage=2))
    with pytest.raises(UserError) as error:
        lower_layers(config, None)
    assert str(error.value).splitlines() == [
        "mesh.stage = 2: the layers alone have no pipeline; nearest: mesh.stage = 1",
        "model.first_k_dense_replace = 5: all 5 layers are dense; nearest: 4",
    ]
