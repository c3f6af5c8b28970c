"""The collectives of a compiled HLO module: kinds, mesh axes, bytes, how often they run."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from k2jax.plan.hlo import Computation, Instruction, Module, arrays, calls, num_bytes, parse
from k2jax.train.step import OPTIMIZER_SCOPE

KIND = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all)"
    r"(-start)?"
)
# Above each: lines, or parts of lines, that it reads.
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
BETWEEN_SLICES = re.compile(r"_xla_megascale_transfer_type=\"(\w+)\"")


class Collective(NamedTuple):
    """One collective instruction of a module."""

    kind: str  # "all-reduce" also where XLA reads part of its result alone, unless it fuses both: "reduce-scatter"
    result: str  # its type: "f32[]", "(bf16[4,16], bf16[4,16])"
    axes: tuple[str, ...]  # mesh axes along which its devices differ
    repeated: bool  # whether it stands in a loop or a branch
    runs: int | None  # in one run of the module; None where data decides, branches count as taken
    op_name: str  # jax's name for where it comes from
    is_started: bool = False  # asynchronous: its end is another instruction
    taken: tuple[str, ...] = ()  # types of what it reads; () where they are not known

    @property
    def has_matrix(self) -> bool:
        """True if one of its arrays has two dims or more. XLA joins what is reduced: norms, and gains' gradients."""
        return any(sum(dim > 1 for dim in array.dims) > 1 for array in arrays(self.result))

    @property
    def num_bytes(self) -> int:
        """Of the whole array on one device: of an all-gather's or all-reduce's result, of what a reduce-scatter takes.

        An asynchronous one names what it takes beside what it gives: the larger is the array.
        """
        sizes = [array.num_bytes for array in arrays(self.result)]
        return max(sizes, default=0) if self.is_started else sum(sizes)

    @property
    def array_bytes(self) -> int:
        """Bytes that decide its time: of the largest array that a device holds before or after it.

        Of a ragged all-to-all the smaller of both: buffers have room to spare on one side, rows are as many on each.
        """
        if not self.taken:
            return self.num_bytes
        if self.kind == "ragged-all-to-all":
            return min(num_bytes(kind) for kind in self.taken[:2])  # what is sent, and the buffer of what comes in
        return max(sum(map(num_bytes, self.taken)), self.num_bytes)


def part_of_name(op_name: str) -> str:
    """The part of the step that an operation belongs to, by jax's name for it."""
    if OPTIMIZER_SCOPE in op_name:
        return "optimizer"
    if "transpose(jvp" in op_name:
        return "backward"
    return "forward" if "jvp" in op_name else "other"


def part_of(collective: Collective) -> str:
    return part_of_name(collective.op_name)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _order(dims: str, permutation: str | None) -> np.ndarray:
    """Device numbers of [dims], its dims then transposed."""
    devices = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return devices.transpose(_ints(permutation)) if permutation else devices


def first_group(line: str) -> np.ndarray | None:
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
        group = first_group(line)
        group = np.arange(math.prod(shape)) if group is None else group
        differs = np.ptp(np.array(np.unravel_index(group, shape)), 1) > 0
    return tuple(axis for axis, differ in zip(sizes, differs, strict=True) if differ)


def as_collective(computation: Computation, one: Instruction, sizes: Mapping[str, int]) -> Collective | None:
    """The collective that `one` is, as if it ran once; None if it is another instruction.

    A computation that libtpu calls all-reduce-scatter has an all-reduce of which a slice is kept.
    """
    match = KIND.fullmatch(one.opcode)
    if match is None:
        return None
    kind = "reduce-scatter" if computation.name.startswith("all-reduce-scatter") else match[1]
    taken = tuple(operand.kind for operand in computation.operands_of(one))
    return Collective(kind, one.kind, _axes(one.attributes, sizes), False, 1, one.op_name, bool(match[2]), taken)


def _found(module: Module, read) -> list[Collective]:
    """All that `read(computation, instruction)` returns of what runs, with its runs and origin."""
    return [
        one._replace(repeated=call.repeated, runs=call.runs, op_name=one.op_name or call.op_name)
        for name, call in calls(module).items()
        for instruction in module.computations[name].instructions
        if (one := read(module.computations[name], instruction))
    ]


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """All of an HLO module that was compiled for a mesh with axes of these sizes.

    A module for several TPU slices is the program of one: sizes are those inside it, and what crosses is not here.
    """
    return _found(parse(text), lambda computation, one: as_collective(computation, one, sizes))


def slice_exchanges(text: str, axes: tuple[str, ...]) -> list[Collective]:
    """All that crosses between the TPU slices of an HLO module; the slices are counted along these mesh axes.

    Kinds are "all-reduce between slices" and the like; their bytes are what a device sends of its own.
    """

    def read(computation: Computation, one: Instruction) -> Collective | None:
        if one.opcode != "send" or not (match := BETWEEN_SLICES.search(one.attributes)):
            return None
        sent = one.kind[1 : one.kind.index("]") + 1]
        return Collective(
            f"{match[1].lower().replace('_', '-')} between slices", sent, axes, False, 1, one.op_name
        )

    return _found(parse(text), read)
