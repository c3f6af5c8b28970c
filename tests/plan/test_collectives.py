"""Collectives in compiled programs: kinds, mesh axes and how often, against programs that say so themselves."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.plan.aot import beyond_exchanges
from k2jax.plan.collectives import collectives, first_group, slice_exchanges

MODULE = """\
%body.1 (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %g = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner.2
}

%inner.2 (p: f32[2]) -> f32[4] {
  ROOT %a = f32[4]{0} all-gather(%p), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %r = (f32[], f32[1]) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %m = f32[8,2]{1,0} all-reduce-start(%x), replica_groups=mesh['a'=2,'b'=2] {'b','a'}, to_apply=%add
  %s = bf16[4]{0} fusion(%m), calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/grads"}
  %n = s32[] constant(7)
  %t = (s32[], f32[2], s32[]) tuple(%zero, %p, %n)
  %w = (s32[], f32[2], s32[]) while(%t), condition=%cond.3, body=%body.1
}

%cond.3 (p: (s32[], f32[2], s32[])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (p: f32[8]) -> bf16[4] {
  %all = bf16[8]{0} all-reduce(%p), replica_groups={{0,2},{1,3}}, to_apply=%add
}

%add (p: f32[], q: f32[]) -> f32[] {
}
"""


def test_reading_by_hand():
    """A gather in a fusion in a loop of seven turns, two numbers at once, a reduced matrix, a fused reduce-scatter."""
    found = {(one.kind, one.result): one for one in collectives(MODULE, {"a": 2, "b": 2})}
    gather = found["all-gather", "f32[4]{0}"]
    assert (gather.axes, gather.repeated, gather.runs, gather.num_bytes) == (("a",), True, 7, 16)
    numbers = found["all-reduce", "(f32[], f32[1])"]
    assert (numbers.axes, numbers.has_matrix, numbers.repeated, numbers.runs) == (("b",), False, False, 1)
    matrix = found["all-reduce", "f32[8,2]{1,0}"]
    assert (matrix.axes, matrix.has_matrix, matrix.num_bytes) == (("a", "b"), True, 64)
    scattered = found["reduce-scatter", "bf16[8]{0}"]
    assert (scattered.axes, scattered.op_name, scattered.num_bytes) == (("a",), "jit(f)/grads", 16)
    assert len(found) == 4
    problems = beyond_exchanges([numbers, matrix, gather], 1)
    assert [problem.split(" ")[0] for problem in problems] == ["all-reduce", "all-gather", "0"]


SLICES = """\
%body.1 (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %send.1 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %after), channel_id=6, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[64,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%after), channel_id=5, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %send.2 = (bf16[2,128]{1,0:T(2,128)(2,1)}, u32[], token[]) send(%y, %after), \
frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}, metadata={op_name="jit(f)/jvp(layers)"}
  %other = (f32[4]{0}, u32[], token[]) send(%y, %after), channel_id=9, is_host_transfer=true
  %w = (s32[], f32[2]) while(%t), condition=%cond.2, body=%body.1, \
backend_config={"known_trip_count":{"n":"5"}}
}

%cond.2 (p: (s32[], f32[2])) -> pred[] {
}
"""


def test_exchanges_between_slices():
    """An all-reduce in a loop of five turns, a gather, and a transfer to the host that is neither."""
    reduced, gathered = sorted(slice_exchanges(SLICES, ("replica",)))[::-1]
    assert (reduced.kind, reduced.axes, reduced.runs, reduced.num_bytes, reduced.repeated) == (
        "all-reduce between slices", ("replica",), 5, 64 * 8 * 128 * 4, True,
    )  # fmt: skip
    assert (gathered.kind, gathered.runs, gathered.num_bytes) == ("all-gather between slices", 1, 512)
    assert gathered.op_name == "jit(f)/jvp(layers)"
    assert collectives(SLICES, {"replica": 1}) == []


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,2,2]T(1,2,0)", [0, 4]),
        ("{{1,5},{0,4}}", [1, 5]),
        ("mesh['x'=8] {'x':(2)2}", [0, 2]),  # a part of an axis
        ("mesh['x'=2,'y'=4] {'y'}", [0, 1, 2, 3]),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", [0, 1, 2, 3]),
    ],
)
def test_groups(groups, first):
    assert first_group(f"all-reduce(%x), replica_groups={groups}, to_apply=%add").tolist() == first


def test_against_a_program_whose_collectives_are_known(mesh_of):
    """A sum over one axis, a gather over two, a shift along one; the sum five times in a scan."""
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)

    def local(x):
        def turn(x, _):
            return jax.lax.psum(x, "tensor") * 0.5, None

        x, _ = jax.lax.scan(turn, x, length=5)
        x = jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)])
        return jax.lax.all_gather(x, ("fsdp", "expert"))

    axes = jax.P(("fsdp", "expert", "tensor"))
    run = jax.shard_map(local, mesh=mesh, in_specs=axes, out_specs=jax.P(None, ("fsdp", "expert")), check_vma=False)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=jax.NamedSharding(mesh, axes))
    text = jax.jit(run).lower(x).compile().as_text()
    found = {one.kind: (one.axes, one.runs, one.num_bytes) for one in collectives(text, mesh.shape)}
    local_bytes = 64 * 16 * 4 // 8
    assert found == {
        "all-reduce": (("tensor",), 5, local_bytes),
        "collective-permute": (("expert",), 1, local_bytes),
        "all-gather": (("fsdp", "expert"), 1, 4 * local_bytes),
    }
