"""Work of TPU kernels (Mosaic custom calls), which HLO shows as black boxes: from their tiling and shapes.

XLA's `lax.ragged_dot` names its tiling; tokamax's splash attention names its blocks; others state a cost themselves.
"""

import math
import re

from k2jax.plan.costs import Costs, Work
from k2jax.plan.hlo import Array, Computation, Instruction

KERNEL = 'custom_call_target="tpu_custom_call"'
# frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,1024,512"}: rows, contracted dim, columns
TILING = re.compile(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"')
# "cost_estimate":{"flops":"2147483648","bytes_accessed":"10485776",...}, of which FLOPs alone are read
COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv)")


def _hbm(array: Array) -> int:
    return array.num_bytes if array.space == 0 else 0


def is_ragged_dot(one: Instruction) -> bool:
    return TILING.search(one.attributes) is not None


def ragged_dot_work(computation: Computation, one: Instruction, filled: float) -> tuple[Work, float]:
    """(work, useful FLOPs) of XLA's kernel if a share `filled` of its rows are there: tiles of the others do not run.

    Its grid goes over columns, rows, contracted dim: rows are read once for each tile of columns, a group's weights
    once for each tile of columns, or for each tile of rows if the contracted dim is cut. The last tile is worked on
    whole. The tiles that two groups share, at most one for each group, are left out.
    """
    tile_rows, tile_inner, tile_columns = map(int, TILING.search(one.attributes).groups())
    left, right = (computation.by_name[name].arrays[0] for name in one.operands[-2:])
    result = one.arrays[0]
    rows, inner, columns = left.dims[0] * filled, left.dims[1], result.dims[-1]
    num_columns, num_inner = math.ceil(columns / tile_columns), math.ceil(inner / tile_inner)
    if len(result.dims) == 3:  # [R, K], [R, N] -> [E, K, N]: the gradient of the weights
        again = filled * num_inner
        written, flops = _hbm(result), 2 * rows * num_inner * tile_inner * num_columns * tile_columns
    else:
        again = 1 if num_inner == 1 else rows / tile_rows / right.dims[0]
        written, flops = filled * _hbm(result), 2 * rows * inner * num_columns * tile_columns
    read = filled * _hbm(left) * num_columns + again * _hbm(right)
    return Work(flops, read + written), 2.0 * rows * inner * columns


def _splash_work(computation: Computation, one: Instruction, phase: str, moved: int) -> Work:
    """Of causal self-attention in square blocks: those on and below the diagonal run, each whole.

    Forward each block of queries reads the keys and values before it; backward each block of keys the queries after it,
    and what the queries have.
    """
    inputs = [array for operand in computation.operands_of(one) for array in operand.arrays]
    query, key, value, *of_queries = (array for array in inputs if array.dtype in ("bf16", "f16", "f32"))
    field = "block_q" if phase == "fwd" else "block_q_dkv"
    block = re.search(rf'{field}\\": (\d+)', one.attributes)
    *outer, length, key_dim = query.dims
    value_dim = value.dims[-1]
    num_blocks = math.ceil(length / int(block[1])) if block else 1
    pairs = math.prod(outer) * length**2 * (num_blocks + 1) / (2 * num_blocks)
    # Times that a block is read beyond the first, on average. One is still there when the next row of blocks begins.
    repeated = (num_blocks * (num_blocks + 1) / 2 - (num_blocks > 1)) / num_blocks - 1
    if phase == "fwd":
        return Work(2 * pairs * (key_dim + value_dim), moved + repeated * (_hbm(key) + _hbm(value)))
    again = _hbm(query) + sum(map(_hbm, of_queries))
    return Work(2 * pairs * (3 * key_dim + 2 * value_dim), moved + repeated * again)


def kernel_work(costs: Costs, computation: Computation, one: Instruction, filled: float) -> Work | None:
    """Work of a Mosaic call; None if it is none. FLOPs are 0 where the kernel says nothing of them: `is_unknown`."""
    if one.opcode != "custom-call" or KERNEL not in one.attributes:
        return None
    if is_ragged_dot(one):
        return ragged_dot_work(computation, one, filled)[0]
    moved = costs.hbm_bytes(computation, one)
    if match := SPLASH.search(one.name):
        return _splash_work(computation, one, match[1], moved)
    stated = COST.search(one.attributes)
    return Work(float(stated[1]) if stated else 0.0, moved)


def is_unknown(one: Instruction) -> bool:
    """True for a Mosaic call whose FLOPs nothing tells. XLA's own tables for ragged_dot have none."""
    if KERNEL not in one.attributes or is_ragged_dot(one) or SPLASH.search(one.name):
        return False
    return COST.search(one.attributes) is None and not one.name.startswith("ragged-dot-metadata")
