"""The communication of a compiled HLO module, read from its text: collectives, their mesh axes, how often they run."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Above each: lines, or parts of lines, that it reads.
# %ag = f32[4,16]{1,0} all-gather(%p), ...     %ar = (f32[], f32[1]) all-reduce-start(%x, %y), ...
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?\("
)
# What an instruction may run besides itself: a loop's body, a branch, a fusion, an asynchronous operation.
# %w = (s32[], f32[2]) while(%t), condition=%cond.3, body=%body.1     fusion(%p), kind=kLoop, calls=%fused.2
CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
# conditional(%i, %a, %b), branch_computations={%one.4, %two.5}
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# bf16[4,16]{1,0}     f8e4m3fn[8]     s32[]
ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]")
# replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b':(2)2}: over a, and over a part of b: two groups
# of devices before it, 2 in it
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
# replica_groups=[4,2]<=[2,2,2]T(1,2,0): 0 to 7 as [2,2,2], its dims transposed, then cut into 4 groups of 2
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# replica_groups={{0,1},{2,3}}, of which the first group tells the axes
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
# source_target_pairs={{0,1},{1,0}}
PAIRS = re.compile(r"source_target_pairs=\{\{(.*?)\}\}")
# libtpu's exchange between slices, by the hosts' runtime: %send = (f32[64,8,128]{2,1,0}, u32[], token[]) send(%x, ...),
# frontend_attributes={...,_xla_megascale_transfer_type="ALL_REDUCE"}. All other collectives stay in their slice.
BETWEEN_SLICES = re.compile(r" = \((\w+\[[\d,]*\]).* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


class Collective(NamedTuple):
    """One collective instruction of a module."""

    kind: str  # "all-reduce" also where XLA reads part of its result alone, unless it fuses both: "reduce-scatter"
    result: str  # its type: "f32[]", "(bf16[4,16], bf16[4,16])"
    axes: tuple[str, ...]  # mesh axes along which its devices differ
    repeated: bool  # whether it stands in a loop or a branch
    runs: int | None  # in one run of the module; None where data decides, branches count as taken
    op_name: str  # jax's name for where it comes from
    is_started: bool = False  # asynchronous: its end is another instruction

    @property
    def has_matrix(self) -> bool:
        """True if one of its arrays has two dims or more. XLA joins what is reduced: norms, and gains' gradients."""
        return any(sum(dim > 1 for dim in dims) > 1 for _, dims in _arrays(self.result))

    @property
    def num_bytes(self) -> int:
        """Of the whole array on one device: of an all-gather's or all-reduce's result, of what a reduce-scatter takes.

        An asynchronous one names what it takes beside what it gives: the larger is the array.
        """
        sizes = [math.prod(dims) * bits // 8 for bits, dims in _arrays(self.result)]
        return max(sizes) if self.is_started else sum(sizes)


def _arrays(kind: str) -> list[tuple[int, list[int]]]:
    """(bits of an element, dims) of each array of a type; pred is 8 bits."""
    found = [(int(m[2]), [int(d) for d in m[3].split(",") if d]) for m in ARRAY.finditer(kind)]
    return found + [(8, [int(d) for d in m.split(",") if d]) for m in re.findall(r"\bpred\[([\d,]*)\]", kind)]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _order(dims: str, permutation: str | None) -> np.ndarray:
    """Device numbers of [dims], its dims then transposed."""
    devices = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return devices.transpose(_ints(permutation)) if permutation else devices


def _first_group(line: str) -> np.ndarray | None:
    """Device numbers of a collective's first group; None where the line says nothing of groups: all devices."""
    if match := MESH_GROUPS.search(line):
        names, sizes = zip(*(entry.rsplit("=", 1) for entry in match[1].split(",")), strict=True)
        devices = _order(match[2] or ",".join(sizes), match[3])
        over = re.findall(r"'[^']+'(?::\(\d+\)\d+)?", match[4])
        shape, kept = [], []
        for name, size in zip(names, map(int, sizes), strict=True):
            part = next((re.search(r":\((\d+)\)(\d+)", entry) for entry in over if entry.startswith(f"{name}:")), None)
            before, own = (int(part[1]), int(part[2])) if part else (1, size)
            shape += [before, own, size // (before * own)]
            kept += [False, part is not None or name in over, False]
        return devices.reshape(shape)[tuple(slice(None) if keep else 0 for keep in kept)].reshape(-1)
    if match := IOTA_GROUPS.search(line):
        return _order(match[2], match[3]).reshape(_ints(match[1]))[0]
    match = LISTED_GROUPS.search(line)
    return np.array(_ints(match[1])) if match else None


def _axes(line: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective's line goes over."""
    shape = tuple(sizes.values())
    if pairs := PAIRS.search(line):
        ends = np.array([_ints(pair) for pair in pairs[1].split("},{")])
        source, target = (np.array(np.unravel_index(side, shape)) for side in ends.T)
        differs = (source != target).any(1)
    else:
        group = _first_group(line)
        group = np.arange(math.prod(shape)) if group is None else group
        differs = np.ptp(np.array(np.unravel_index(group, shape)), 1) > 0
    return tuple(axis for axis, differ in zip(sizes, differs, strict=True) if differ)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO module, by its name; the entry's is ""."""
    found, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            name = "" if line.startswith("ENTRY ") else line.split()[0].lstrip("%")
            found[name] = []
        elif name is not None:
            found[name].append(line)
    return found


def _called(line: str) -> list[str]:
    branches = [name.strip().lstrip("%") for match in BRANCHES.findall(line) for name in match.split(",")]
    return CALLED.findall(line) + branches


def _value(lines: list[str], name: str) -> int | None:
    """The integer constant that `name` is in a computation, None where it is something else."""
    return next(
        (int(m[1]) for line in lines if (m := re.search(rf"%?{re.escape(name)} = \w+\[\]\S* constant\((\d+)\)", line))),
        None,
    )


def _operands(lines: list[str], name: str) -> list[str]:
    """Names of the operands of the instruction `name`."""
    line = next(line for line in lines if re.match(rf"\s*(?:ROOT )?%?{re.escape(name)} = ", line))
    inside = re.search(r"[\w-]+\((%[^()]*)\)", line.split(" = ", 1)[1])
    return [operand.split()[-1].lstrip("%") for operand in inside[1].split(",")] if inside else []


def _turns(line: str, caller: list[str], condition: list[str]) -> int | None:
    """Trip count of the loop of a `while` line, if XLA states it or a constant bounds it; None if data decides."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    root = next((x for x in condition if "ROOT" in x and " compare(" in x and "direction=LT" in x), None)
    if root is None:
        return None
    bound = re.search(r" compare\(([^()]*)\)", root)[1].split(",")[1].split()[-1].lstrip("%")
    if (value := _value(condition, bound)) is not None:
        return value
    place = next((re.search(rf"%?{re.escape(bound)} = .*get-tuple-element\(.*index=(\d+)", x) for x in condition
                  if re.match(rf"\s*%?{re.escape(bound)} = ", x)), None)  # fmt: skip
    carried = _operands(caller, re.search(r" while\((?:[^()%]*)%?([\w.-]+)\)", line)[1])
    return _value(caller, carried[int(place[1])]) if place and carried else None


class _Call(NamedTuple):
    """The calls of a computation, taken over all its callers."""

    runs: int | None
    repeated: bool
    op_name: str


def _op_name(line: str) -> str:
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""


def _calls(computations: dict[str, list[str]]) -> dict[str, _Call]:
    """Every computation that runs, with its callers' runs summed up. The call graph has no cycles and is small."""
    found = {}
    todo = [("", _Call(1, False, ""))]
    while todo:
        name, call = todo.pop()
        before = found.get(name, _Call(0, False, ""))
        total = None if None in (before.runs, call.runs) else before.runs + call.runs
        found[name] = _Call(total, before.repeated or call.repeated, call.op_name)
        for line in computations[name]:
            condition = re.search(r" while\(.*condition=%?([\w.-]+)", line)
            turns = _turns(line, computations[name], computations[condition[1]]) if condition else 1
            runs = None if None in (turns, call.runs) else turns * call.runs
            repeated = call.repeated or bool(condition) or " conditional(" in line
            todo += [(callee, _Call(runs, repeated, _op_name(line))) for callee in _called(line)]
    return found


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """All of an HLO module that was compiled for a mesh with axes of these sizes.

    A module for several TPU slices is the program of one: sizes are those inside it, and what crosses is not here.
    """
    computations = _computations(text)
    found = []
    for name, call in _calls(computations).items():
        fused = name.startswith("all-reduce-scatter")  # libtpu's: an all-reduce of which a slice is kept
        for line in computations[name]:
            if match := COLLECTIVE.search(line):
                kind = "reduce-scatter" if fused else match[2]
                origin = _op_name(line) or call.op_name
                found.append(
                    Collective(kind, match[1], _axes(line, sizes), call.repeated, call.runs, origin, bool(match[3]))
                )
    return found


def slice_exchanges(text: str, axes: tuple[str, ...]) -> list[Collective]:
    """All that crosses between the TPU slices of an HLO module; the slices are counted along these mesh axes.

    Kinds are "all-reduce between slices" and the like; their bytes are what a device sends of its own.
    """
    computations = _computations(text)
    return [
        Collective(
            f"{match[2].lower().replace('_', '-')} between slices",
            match[1],
            axes,
            call.repeated,
            call.runs,
            _op_name(line) or call.op_name,
        )
        for name, call in _calls(computations).items()
        for line in computations[name]
        if (match := BETWEEN_SLICES.search(line))
    ]
