"""A compiled HLO module read from its text: computations, instructions, arrays, how often each loop turns.

In a scheduled module (`is_scheduled=true`, what compilers give) instructions stand in the order in which they run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# Above each: lines, or parts of lines, that it reads.
# bf16[4,16]{1,0:T(8,128)(2,1)S(1)}     f8e4m3fn[8]     s32[]     pred[2]
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
# the S(1) of a layout: the memory space, 0 where nothing is said
SPACE = re.compile(r"S\((\d+)\)")
#   ROOT %x.1 = f32[2]{0} add(     the name alone; types have parentheses of their own
NAME = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
# }     }, execution_thread="sparsecore"     the end of a computation
END = re.compile(r"\}(, .*)?")
OPCODE = re.compile(r"([\w-]+)\(")
OPERAND = re.compile(r"%([\w.-]+)")
# What an instruction may run besides itself: a loop's body, a branch, a fusion, what is asynchronous or SparseCore's.
# while(%t), condition=%cond.3, body=%body.1     fusion(%p), calls=%fused.2     call-start(%x), to_apply=%called.18
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
# conditional(%i, %a), branch_computations={%one.4, %two.5}     custom-call-start(), called_computations={%called.19}
CALLED_SETS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BITS = re.compile(r"\d+")


class Array(NamedTuple):
    """One array of a type."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # memory space: 0 the device's large memory; on TPU 1 is VMEM, others are flags and scalars' memory

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Without what tiling pads. A pred is a byte; a token or an opaque value has none."""
        bits = BITS.search(self.dtype)
        return self.size * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) // 8


def arrays(kind: str) -> list[Array]:
    """The arrays of a type such as "f32[]" or "(bf16[4,16]{1,0:S(1)}, s32[2])", those of inner tuples too."""
    found = []
    for dtype, dims, layout in ARRAY.findall(kind):
        space = SPACE.search(layout)
        found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return found


def num_bytes(kind: str) -> int:
    return sum(array.num_bytes for array in arrays(kind))


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    kind: str  # its type: "f32[]", "(bf16[4,16]{1,0}, bf16[4,16]{1,0})"
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands for operands in a parameter or constant
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.kind)

    @cached_property
    def op_name(self) -> str:
        """jax's name for where it comes from; "" where XLA gives none."""
        match = OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @cached_property
    def callees(self) -> tuple[str, ...]:
        sets = (name.strip().lstrip("%") for names in CALLED_SETS.findall(self.attributes) for name in names.split(","))
        return (*CALLED.findall(self.attributes), *filter(None, sets))

    def attribute(self, key: str) -> str | None:
        """The value of `key=value` or of `key={value}`."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.-]+))", self.attributes)
        return match and (match[2] if match[1] is None else match[1])


@dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order of the text."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one, once each."""
        found = {one.name: [] for one in self.instructions}
        for one in self.instructions:
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in self.instructions if one.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(one.literal): one for one in self.instructions if one.opcode == "parameter"}

    def operands_of(self, one: Instruction) -> list[Instruction]:
        """Instructions that `one` reads, once each, as far as they stand here."""
        return [self.by_name[name] for name in dict.fromkeys(one.operands) if name in self.by_name]


@dataclass(frozen=True, eq=False)
class Module:
    computations: dict[str, Computation]
    entry: str

    def callees(self, one: Instruction) -> list[Computation]:
        return [self.computations[name] for name in one.callees if name in self.computations]

    def inside(self, one: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """All instructions that `one` runs, however deep, and where they stand; not itself."""
        for callee in self.callees(one):
            for inner in callee.instructions:
                yield callee, inner
                yield from self.inside(inner)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _instruction(line: str) -> Instruction | None:
    name = NAME.match(line)
    if name is None:
        return None
    start = name.end()
    end = _closing(line, start) + 1 if line[start : start + 1] == "(" else line.find(" ", start)
    opcode = OPCODE.match(line, end + 1)
    if end < 0 or opcode is None:
        return None
    closing = _closing(line, opcode.end() - 1)
    inside, is_leaf = line[opcode.end() : closing], opcode[1] in ("parameter", "constant")
    operands = () if is_leaf else tuple(OPERAND.findall(inside))
    return Instruction(
        name[2], line[start:end], opcode[1], operands, inside if is_leaf else "", line[closing + 1 :], bool(name[1])
    )


def _lines(text: str) -> Iterator[str]:
    """The lines of a text. An attribute may hold line breaks of its own, as tokamax's kernel_metadata does."""
    pending = ""
    for line in text.splitlines():
        if pending and line and not NAME.match(line) and not END.fullmatch(line):
            pending += line
            continue
        if pending:
            yield pending
        pending = line if NAME.match(line) else ""
        if not pending:
            yield line
    if pending:
        yield pending


def parse(text: str) -> Module:
    """A module of `compiled.as_text()`."""
    computations, current, entry = {}, None, ""
    for line in _lines(text):
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            words = line.split()
            name = words[words[0] == "ENTRY"].lstrip("%")
            entry = name if words[0] == "ENTRY" else entry
            current = computations[name] = Computation(name)
        elif current is not None and (one := _instruction(line)):
            current.instructions.append(one)
    return Module(computations, entry)


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that `name` is, through copies; None where it is something else."""
    one = computation.by_name.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "copy-done", "copy-start") and one.operands:
        one = computation.by_name.get(one.operands[0])
    is_number = one is not None and one.opcode == "constant" and re.fullmatch(r"-?\d+", one.literal)
    return int(one.literal) if is_number else None


def _bound(module: Module, caller: Computation, loop: Instruction) -> tuple[Computation, str] | None:
    """The place of the number that bounds a loop's counter: in its condition, or among what it is given."""
    condition = module.computations[loop.attribute("condition")]
    compare = next((one for one in condition.instructions if one.is_root), None)
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    name = compare.operands[1]
    if condition.by_name[name].opcode != "get-tuple-element":
        return condition, name
    given = caller.by_name.get(loop.operands[0])
    if given is None or given.opcode != "tuple":
        return None
    return caller, given.operands[int(condition.by_name[name].attribute("index"))]


def turns(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Trip count of a `while`, if XLA states it or a constant bounds it; None if data decides."""
    if known := TRIP_COUNT.search(loop.attributes):
        return int(known[1])
    bound = _bound(module, caller, loop)
    return bound and _constant(*bound)


def most_turns(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """The larger trip count of a loop that runs one of two, as each device's number decides; None of another one."""
    bound = _bound(module, caller, loop)
    one = bound and bound[0].by_name.get(bound[1])
    if one is None or one.opcode != "select":
        return None
    choices = [_constant(bound[0], name) for name in one.operands[1:]]
    return None if None in choices else max(choices)


class Call(NamedTuple):
    """The calls of a computation, taken over all its callers."""

    runs: int | None  # in one run of the module; None where data decides, branches count as taken
    repeated: bool  # whether it stands in a loop or a branch
    op_name: str  # of a caller


def calls(module: Module) -> dict[str, Call]:
    """Every computation that runs, with its callers' runs summed up. The call graph has no cycles and is small."""
    found = {}
    todo = [(module.entry, Call(1, False, ""))]
    while todo:
        name, call = todo.pop()
        before = found.get(name, Call(0, False, ""))
        total = None if None in (before.runs, call.runs) else before.runs + call.runs
        found[name] = Call(total, before.repeated or call.repeated, call.op_name)
        computation = module.computations[name]
        for one in computation.instructions:
            is_loop = one.opcode == "while"
            count = turns(module, computation, one) if is_loop else 1
            runs = None if None in (count, call.runs) else count * call.runs
            repeated = call.repeated or is_loop or one.opcode == "conditional"
            todo += [(callee.name, Call(runs, repeated, one.op_name)) for callee in module.callees(one)]
    return found
