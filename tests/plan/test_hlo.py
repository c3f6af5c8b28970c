"""The parser of HLO text, against modules whose content is plain to see."""

import pytest

from k2jax.plan.hlo import Array, arrays, calls, most_turns, parse, turns

MODULE = """\
HloModule step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[8,128]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"

%outer (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[8,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]{:S(8)}) call-start(%p), to_apply=%inner
  ROOT %d = f32[8,128]{1,0:T(8,128)} call-done(%s)
}, execution_thread="sparsecore"

%body (t: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %start = ((), (), (s32[32]{0}, /*index=5*/s32[0]{0})) custom-call-start(), called_computations={%outer}
  ROOT %next = (s32[], f32[8,128], s32[]) tuple(%t, %t, %t)
}

%condition (t: (s32[], f32[8,128], s32[])) -> pred[] {
  %t = (s32[], f32[8,128], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %kernel = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"blocks":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(f)/kernel"}
  %zero = s32[] constant(0)
  %seven = s32[] constant(7)
  %copy = s32[] copy(%seven)
  %tuple = (s32[], f32[8,128], s32[]) tuple(%zero, %p, /*index=2*/%copy)
  %loop = (s32[], f32[8,128], s32[]) while(%tuple), condition=%condition, body=%body
  %some = pred[] custom-call(), custom_call_target="X"
  %either = s32[] select(%some, %seven, %zero)
  %tuple.2 = (s32[], f32[8,128], s32[]) tuple(%zero, %p, %either)
  %loop.2 = (s32[], f32[8,128], s32[]) while(%tuple.2), condition=%condition, body=%body
  %total = f32[] reduce(%p, %zero), dimensions={0,1}, to_apply=%add.1
  ROOT %r = f32[8,128]{1,0:T(8,128)} copy(%p)
}
"""


def test_instructions():
    module = parse(MODULE)
    assert list(module.computations) == ["add.1", "inner", "outer", "body", "condition", "main"]
    assert module.entry == "main"
    main = module.computations["main"]
    assert [one.name for one in main.instructions if one.is_root] == ["r"]
    kernel = main.by_name["kernel"]
    assert (kernel.opcode, kernel.operands, kernel.op_name) == ("custom-call", ("p",), "jit(f)/kernel")
    assert kernel.arrays == [Array("bf16", (8, 128), 1)] and kernel.arrays[0].num_bytes == 2048
    assert '{\\"block_q\\": 1024}' in kernel.attributes, "an attribute with line breaks is one"
    assert main.by_name["tuple"].operands == ("zero", "p", "copy")
    assert main.by_name["seven"].literal == "7" and main.by_name["loop"].attribute("body") == "body"
    assert {one.name for one in main.users["p"]} == {"kernel", "tuple", "tuple.2", "total", "r"}
    assert main.parameters[0].name == "p"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("f32[]", [Array("f32", (), 0)]),
        ("pred[3]{0}", [Array("pred", (3,), 0)]),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, (s4[6]{0}, u32[]{:S(2)}))",
         [Array("bf16", (2, 3), 1), Array("s4", (6,), 0), Array("u32", (), 2)]),
        ("token[]", [Array("token", (), 0)]),
        ("f8e4m3fn[8]{0}", [Array("f8e4m3fn", (8,), 0)]),
    ],
)  # fmt: skip
def test_types(kind, expected):
    assert arrays(kind) == expected


def test_bytes():
    assert [array.num_bytes for array in arrays("(pred[3], s4[6], bf16[2,3], token[], f8e4m3fn[8], c64[2])")] == [
        3, 3, 12, 0, 8, 16,
    ]  # fmt: skip


def test_turns():
    """A bound that the loop is given, through a copy; one of two, which a device's own number chooses."""
    module = parse(MODULE)
    main = module.computations["main"]
    loop, other = main.by_name["loop"], main.by_name["loop.2"]
    assert (turns(module, main, loop), most_turns(module, main, loop)) == (7, None)
    assert (turns(module, main, other), most_turns(module, main, other)) == (None, 7)


def test_what_runs_inside_asynchronous_calls():
    """A collective that libtpu gives to SparseCore stands two calls below the loop."""
    module = parse(MODULE)
    start = module.computations["body"].by_name["start"]
    inside = [one.opcode for _, one in module.inside(start)]
    assert inside == ["parameter", "call-start", "parameter", "all-gather", "call-done"]
    found = calls(module)
    assert found["outer"].repeated and found["outer"].runs is None  # seven turns of one loop, unknown ones of the other
    assert found["inner"] == found["outer"]
