"""Playing small schedules whose clock can be followed by hand: 1 TFLOP/s, 1 GB/s of memory, 1 GB/s a link."""

import pytest

from k2jax.plan.chips import Chip, Network, Ring
from k2jax.plan.costs import Costs
from k2jax.plan.hlo import parse
from k2jax.plan.loops import Loops
from k2jax.plan.schedule import Rates, Schedule

SIZES = {"fsdp": 4, "expert": 2}
NETWORK = Network(
    Chip(1e12, 1e9, 1e9), {"fsdp": (Ring(4, True),), "expert": (Ring(2, True),)}, dict.fromkeys(SIZES, 1), SIZES
)
GATHER = "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"  # over fsdp: 3/4 of the bytes on two links
GATHER_MS = 8 * 0.75 / 2
HEAD = """\
ENTRY %main (a: f32[250000]) -> f32[] {
  %a = f32[250000]{0} parameter(0)
  %x = f32[2000,250]{1,0:S(1)} parameter(1)
  %y = f32[250,2000]{1,0:S(1)} parameter(2)
"""
MEGABYTE_MS = 1.0  # 250,000 float32 numbers to or from memory
COPY = "f32[250000]{0:S(1)} copy(%a)"  # one of them
DOT = "f32[2000,2000]{1,0:S(1)} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
DOT_MS = 2 * 2000 * 2000 * 250 / 1e12 * 1e3


def played(*lines, before="", rates=Rates()):
    text = before + HEAD + "".join(f"  %{line}\n" for line in lines) + "  ROOT %r = f32[] constant(0)\n}\n"
    module = parse(text)
    return Schedule(module, Costs(module).work, NETWORK, Loops(module).turns, rates).play()


def ms(*values):
    return pytest.approx([value / 1e3 for value in values])


def test_roofline():
    """Each instruction for the longer of its FLOPs and its bytes, at the shares of the peaks that are given."""
    done = played(f"d = {DOT}", f"c = {COPY}")
    assert [done.seconds, done.core_seconds, done.exposed] == ms(DOT_MS + 1, DOT_MS + 1, 0)
    done = played(f"d = {DOT}", f"c = {COPY}", rates=Rates(0.5, 0.25))
    assert [done.seconds] == ms(2 * DOT_MS + 4)


def test_synchronous():
    done = played(f"c = {COPY}", f"g = f32[2000000]{{0}} all-gather(%a), {GATHER}", f"d = {DOT}")
    assert [done.seconds, done.exposed] == ms(1 + GATHER_MS + DOT_MS, GATHER_MS)
    ((_, transfer),) = done.transfers
    assert (transfer.is_async, transfer.compute, transfer.collective.axes) == (False, 0, ("fsdp",))
    slower = played(f"g = f32[2000000]{{0}} all-gather(%a), {GATHER}", rates=Rates(links=0.5))
    assert [slower.exposed] == ms(2 * GATHER_MS)


@pytest.mark.parametrize("copies", [1, 3, 5])
def test_asynchronous(copies):
    """The core's work between its start and its end hides it, until there is nothing left to hide."""
    start = f"s = (f32[250000]{{0}}, f32[2000000]{{0}}) all-gather-start(%a), {GATHER}"
    done = played(start, *(f"c{i} = {COPY}" for i in range(copies)), "g = f32[2000000]{0} all-gather-done(%s)")
    exposed = max(0, GATHER_MS - copies)
    assert [done.seconds, done.exposed] == ms(copies + exposed, exposed)
    ((_, transfer),) = done.transfers
    assert transfer.is_async and [transfer.compute, transfer.seconds] == ms(copies, GATHER_MS)


def test_links_are_shared_within_an_axis_alone():
    """Two gathers over one axis follow each other; one over the other axis runs beside them."""
    first = f"s = (f32[250000]{{0}}, f32[2000000]{{0}}) all-gather-start(%a), {GATHER}"
    second = f"s2 = (f32[250000]{{0}}, f32[2000000]{{0}}) all-gather-start(%a), {GATHER}"
    other = "s3 = (f32[250000]{0}, f32[2000000]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8], dimensions={0}"
    ends = [f"g{i} = f32[2000000]{{0}} all-gather-done(%{name})" for i, name in enumerate(("s", "s2"))]
    assert [played(first, second, *ends).seconds] == ms(2 * GATHER_MS)
    over_two = 8 / 2  # half of the bytes over one link
    beside = played(first, other, ends[0], "g3 = f32[2000000]{0} all-gather-done(%s3)")
    assert [beside.seconds] == ms(max(GATHER_MS, over_two))
    assert [played(first, second).seconds] == ms(2 * GATHER_MS), "what nothing waits for ends with the computation"


LOOP = f"""\
%inner (p: f32[250000]) -> f32[2000000] {{
  %p = f32[250000]{{0}} parameter(0)
  ROOT %g = f32[2000000]{{0}} all-gather(%p), {GATHER}
}}, execution_thread="sparsecore"

%table (t: f32[250000], i: s32[1000]) -> f32[125000] {{
  %t = f32[250000]{{0}} parameter(0)
  %i = s32[]{{:S(2)}} parameter(1)
  ROOT %g = f32[125000]{{0}} dynamic-slice(%t, %i), dynamic_slice_sizes={{125000}}
}}, execution_thread="sparsecore"

%body (t: f32[250000]) -> f32[250000] {{
  %a = f32[250000]{{0}} parameter(0)
  %s = ((), (), s32[]) custom-call-start(), called_computations={{%inner}}
  %u = ((f32[250000]{{0}}), f32[2000000]{{0}}, s32[]) custom-call-update(%s, %a)
  %c = f32[250000]{{0:S(1)}} copy(%a)
  %d = f32[2000000]{{0}} custom-call-done(%u)
  ROOT %n = f32[250000]{{0}} bitcast(%a)
}}

%condition (t: f32[250000]) -> pred[] {{
  %a = f32[250000]{{0}} parameter(0)
  ROOT %go = pred[] custom-call(%a), custom_call_target="X"
}}

"""
WHILE = 'w = f32[250000]{0} while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}'


def test_loops_and_collectives_of_sparsecore():
    """A collective that libtpu gave to SparseCore is asynchronous; its call's start, update and end are one."""
    done = played(WHILE, before=LOOP)
    assert [done.seconds, done.exposed, done.core_seconds] == ms(5 * GATHER_MS, 5 * (GATHER_MS - 1), 5)
    (((name, transfer), runs),) = done.transfers.items()
    assert (name, transfer.name, transfer.is_async, runs) == ("body", "u", True, 5)


def test_sparsecore_begins_with_its_update():
    """Between a start without inputs and its update the inputs may be made, so nothing is hidden there."""
    lines = [
        "s = ((), (), s32[]) custom-call-start(), called_computations={%inner}",
        f"d = {DOT}",
        "u = ((f32[250000]{0}), f32[2000000]{0}, s32[]) custom-call-update(%s, %a)",
        f"c = {COPY}",
        "e = f32[2000000]{0} custom-call-done(%u)",
    ]
    assert [played(*lines, before=LOOP).seconds] == ms(DOT_MS + GATHER_MS)


def test_sparsecore():
    """Half a megabyte read and written beside the core, at a share of the memory's bandwidth."""
    lines = [
        "s = ((), (), s32[]) custom-call-start(), called_computations={%table}",
        "u = ((f32[250000]{0}), f32[125000]{0}, s32[]) custom-call-update(%s, %a)",
        f"d = {DOT}",
        "e = f32[125000]{0} custom-call-done(%u)",
    ]
    done = played(*lines, before=LOOP, rates=Rates(sparse_core=0.25))
    assert [done.seconds, done.exposed, done.exposed_other] == ms(4, 0, 4 - DOT_MS)
    assert done.work.hbm_bytes == 1e6


def test_prefetches_take_what_memory_has_to_spare():
    """A copy to VMEM runs under a matmul, and not under another copy."""
    start = "s = (f32[250000]{0:S(1)}, f32[250000]{0}, u32[]) copy-start(%a)"
    end = "e = f32[250000]{0:S(1)} copy-done(%s)"
    assert [played(start, f"d = {DOT}", end).seconds] == ms(max(DOT_MS, MEGABYTE_MS))
    assert [played(start, f"c = {COPY}", end).seconds] == ms(2 * MEGABYTE_MS)


def test_branches():
    """The longer one."""
    before = LOOP.replace("%body (", "%long (") + LOOP.split("%body")[0].replace("%inner", "%x").replace("%table", "%y")
    branch = "b = f32[250000]{0} conditional(%a, %a, %a), true_computation=%long, false_computation=%x"
    assert [played(branch, before=before).seconds] == ms(GATHER_MS)


NESTED = """\
%turn (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[], s32[]) parameter(0)
  %a = f32[250000]{0} custom-call(), custom_call_target="AllocateBuffer"
  %c = f32[250000]{0:S(1)} copy(%a)
  ROOT %next = (s32[], s32[]) tuple(%t, %t)
}

%more (t: (s32[], s32[])) -> pred[] {
  %t = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%rows (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %begin = s32[] add(%i, %i)
  %bounds = (s32[], s32[]) tuple(%i, %begin)
  ROOT %w = (s32[], s32[]) while(%bounds), condition=%more, body=%turn, metadata={op_name="attention/while"}
}

"""


def test_loops_that_data_decides():
    """One inside another of 16 turns is taken as causal attention's, 1 to 16 turns; one alone turns once."""
    outer = 'w = (s32[], s32[]) while(%a), condition=%more, body=%rows, backend_config={"known_trip_count":{"n":"16"}}'
    alone = "v = (s32[], s32[]) while(%a), condition=%more, body=%turn"
    assert [played(outer, before=NESTED).seconds] == ms(sum(range(1, 17)))
    module = parse(NESTED + HEAD + f"  %{alone}\n  ROOT %r = f32[] constant(0)\n}}\n")
    loops = Loops(module)
    main = module.computations["main"]
    assert loops.turns(main, main.by_name["v"]) == 1
    assert [a.reason for a in loops.assumptions.values()] == ["unknown: as if it turned once"]
