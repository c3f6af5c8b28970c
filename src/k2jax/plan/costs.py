"""Work of single HLO instructions: FLOPs of matmuls, and the bytes that they move in a device's large memory.

FLOPs are those of `dot` and `convolution`, in fusions too: on a TPU all else runs on other units and is memory-bound.
Bytes are the operands and results that stand outside of VMEM, each once. Of what is sliced, gathered or updated in
place only the touched part counts. Padding by tiles does not count, nor does what caches save.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from k2jax.plan.hlo import Array, Computation, Instruction, Module

# Instructions that move nothing: names for what is there, or others that run in them.
FREE = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
ALLOCATION = 'custom_call_target="AllocateBuffer"'
DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")


class Work(NamedTuple):
    """The work of an instruction that runs once."""

    flops: float = 0.0
    hbm_bytes: float = 0.0


def _numbers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part]


def _dot_flops(computation: Computation, one: Instruction) -> float:
    """2 x result x contracted dims."""
    left = computation.by_name[one.operands[0]].arrays[0]
    contracted = math.prod(left.dims[dim] for dim in _numbers(one.attribute("lhs_contracting_dims")))
    return 2.0 * one.arrays[0].size * contracted


def _window(one: Instruction, num_dims: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(size, stride, padding below, dilation of the input, of the kernel) of each spatial dim."""
    match = WINDOW.search(one.attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}

    def values(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * num_dims

    columns = values("size", "1"), values("stride", "1"), values("pad", "0_0"), values("lhs_dilate", "1")
    for size, stride, pad, left, right in zip(*columns, values("rhs_dilate", "1"), strict=True):
        yield int(size), int(stride), int(pad.split("_")[0]), int(left), int(right)


def _convolution_flops(computation: Computation, one: Instruction) -> float:
    """2 x pairs of input and kernel entries that meet. XLA's TPU compiler writes matmuls as convolutions.

    Padding and dilation are no work: a batch dim becomes a spatial one whose window meets a single entry.
    """
    left, right = (computation.by_name[name].arrays[0].dims for name in one.operands[:2])
    of_left, of_right, of_result = DIM_LABELS.search(one.attributes).groups()
    input_size, kernel_size = dict(zip(of_left, left, strict=True)), dict(zip(of_right, right, strict=True))
    result_size = dict(zip(of_result, one.arrays[0].dims, strict=True))
    spatial = sorted(label for label in of_left if label.isdigit())
    meetings = 1
    for label, (size, stride, pad, dilation, kernel_dilation) in zip(spatial, _window(one, len(spatial)), strict=True):
        start = np.arange(result_size[label]) * stride - pad
        reach = (input_size[label] - 1) * dilation + 1
        places = (start + k * kernel_dilation for k in range(size))
        meetings *= sum(int(np.sum((at >= 0) & (at < reach) & (at % dilation == 0))) for at in places)
    groups = int(one.attribute("batch_group_count") or 1)
    return 2.0 * meetings * input_size["b"] / groups * kernel_size["i"] * result_size["f"]


def _hbm(arrays: list[Array]) -> int:
    return sum(array.num_bytes for array in arrays if array.space == 0)


def _through(computation: Computation, one: Instruction) -> Instruction:
    """The instruction that `one` is another name of."""
    while one.opcode in ("bitcast", "reshape") and one.operands and one.operands[0] in computation.by_name:
        one = computation.by_name[one.operands[0]]
    return one


class Costs:
    """Work of a module's instructions, kept for those that were asked for."""

    def __init__(self, module: Module):
        self.module = module
        self._flops: dict[str, float] = {}
        self._reads: dict[tuple[str, str], int | None] = {}

    def work(self, computation: Computation, one: Instruction) -> Work:
        """Of `one` in `computation`. Loops, branches and calls have none of their own: their instructions have.

        What is asynchronous counts where it starts, with all that it runs.
        """
        if one.opcode in FREE or one.opcode.endswith(("-done", "-update")) or ALLOCATION in one.attributes:
            return Work()
        if one.opcode.endswith("-start") and (callees := self.module.callees(one)):
            inside = [self.work(callee, inner) for callee in callees for inner in callee.instructions]
            return Work(*map(sum, zip(*inside, strict=True)))
        return Work(self.flops(computation, one), self.hbm_bytes(computation, one))

    def flops(self, computation: Computation, one: Instruction) -> float:
        if one.opcode == "dot":
            return _dot_flops(computation, one)
        if one.opcode == "convolution":
            return _convolution_flops(computation, one)
        return sum(map(self._flops_inside, self.module.callees(one))) if one.opcode == "fusion" else 0.0

    def _flops_inside(self, computation: Computation) -> float:
        if computation.name not in self._flops:
            self._flops[computation.name] = sum(self.flops(computation, one) for one in computation.instructions)
        return self._flops[computation.name]

    def hbm_bytes(self, computation: Computation, one: Instruction) -> int:
        operands, opcode = computation.operands_of(one), one.opcode
        if opcode in ("slice", "dynamic-slice", "gather"):
            source = one.arrays if _hbm(operands[0].arrays) else []
            return sum(array.num_bytes for array in source) + _hbm(one.arrays)
        if opcode == "dynamic-update-slice":  # in place: the compiler copies, by an instruction, where it cannot
            return _hbm(operands[1].arrays) + (operands[1].arrays[0].num_bytes if _hbm(one.arrays) else 0)
        if opcode in ("copy-start", "slice-start"):
            # copy-start = (result, source, flag), slice-start = ((source), result, flag)
            moved = one.arrays[opcode == "slice-start"]
            return moved.num_bytes * ((moved.space == 0) + (operands[0].arrays[0].space == 0))
        if opcode == "fusion":
            return self._read_by_fusion(computation, one) + self._written_by_fusion(one)
        return sum(_hbm(operand.arrays) for operand in operands) + _hbm(one.arrays)

    def _read_by_fusion(self, computation: Computation, one: Instruction) -> int:
        body, total = self.module.callees(one)[0], {}
        for at, name in enumerate(one.operands):
            whole = _hbm(computation.by_name[name].arrays) if name in computation.by_name else 0
            touched = self._touched(body, body.parameters[at]) if at in body.parameters else None
            total[name] = max(total.get(name, 0), whole if touched is None else min(touched, whole))
        return sum(total.values())

    def _touched(self, computation: Computation, one: Instruction) -> int | None:
        """Bytes of `one` that are read in the computation of a fusion; None: all of it."""
        key = computation.name, one.name
        if key not in self._reads:
            reads = [self._touched_by(computation, one.name, user) for user in computation.users[one.name]]
            self._reads[key] = None if None in reads or one.is_root else sum(reads)
        return self._reads[key]

    def _touched_by(self, computation: Computation, name: str, user: Instruction) -> int | None:
        if user.opcode in ("bitcast", "reshape"):
            return self._touched(computation, user)
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
            return sum(array.num_bytes for array in user.arrays)
        if user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            return 0  # what stays as it was is not read
        if user.opcode == "fusion":
            body = self.module.callees(user)[0]
            reads = [self._touched(body, body.parameters[at]) for at, n in enumerate(user.operands) if n == name]
            return None if None in reads else sum(reads)
        return None

    def _written_by_fusion(self, one: Instruction) -> int:
        return sum(
            written if array.space == 0 else 0
            for array, written in zip(one.arrays, self._written(self.module.callees(one)[0]), strict=True)
        )

    def _written(self, body: Computation) -> list[int]:
        """Bytes written of each array of a fusion's result."""
        root = _through(body, body.root)
        results = [body.by_name[name] for name in root.operands] if root.opcode == "tuple" else [body.root]
        written = []
        for result in results:
            source = _through(body, result)
            if source.opcode == "fusion":
                written += self._written(self.module.callees(source)[0])
            elif source.opcode == "dynamic-update-slice" and self._is_given(body, source.operands[0]):
                written.append(body.by_name[source.operands[1]].arrays[0].num_bytes)
            elif source.opcode == "scatter" and self._is_given(body, source.operands[0]):
                written.append(2 * body.by_name[source.operands[-1]].arrays[0].num_bytes)  # read, added to, written
            else:
                written += [array.num_bytes for array in result.arrays]
        return written

    def _is_given(self, body: Computation, name: str) -> bool:
        """True if it is a parameter, possibly updated before: then it is updated in place."""
        one = _through(body, body.by_name[name])
        while one.opcode in ("dynamic-update-slice", "scatter"):
            one = _through(body, body.by_name[one.operands[0]])
        return one.opcode == "parameter"

