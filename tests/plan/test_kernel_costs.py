"""Work of TPU kernels, against their grids walked block by block. hlo/kernels.txt: lines of libtpu 0.0.52 for v5p."""

import math
from pathlib import Path

import pytest

from k2jax.plan.costs import Costs
from k2jax.plan.hlo import parse
from k2jax.plan.kernel_costs import is_ragged_dot, is_unknown, kernel_work, ragged_dot_work

TEXT = (Path(__file__).parent / "hlo" / "kernels.txt").read_text()


def work_of(name, filled=1.0, text=TEXT, everything_in_hbm=True):
    module = parse(text.replace("S(1)", "") if everything_in_hbm else text)
    main = module.computations["main"]
    return kernel_work(Costs(module), main, main.by_name[name], filled)


def fetched(grid, blocks):
    """Bytes that a pipelined kernel copies: of each operand a block whenever its place differs from the turn before.

    blocks: [(bytes of a block, place of the block in a turn)]
    """
    total, before = 0, [None] * len(blocks)
    for turn in grid:
        for i, (size, place) in enumerate(blocks):
            if place(turn) != before[i]:
                total, before[i] = total + size, place(turn)
    return total


def ragged_grid(rows, inner, columns, tiles, num_groups):
    """Turns (column tile, row tile, inner tile) and the group of a row tile; groups are even and end with a tile."""
    num_rows, num_inner, num_columns = (math.ceil(n / t) for n, t in zip((rows, inner, columns), tiles, strict=True))
    turns = [(n, m, k) for n in range(num_columns) for m in range(num_rows) for k in range(num_inner)]
    return turns, lambda m: m * num_groups // num_rows


@pytest.mark.parametrize("tiles", [(128, 512, 1024), (128, 512, 128), (128, 128, 256), (128, 512, 384)])
def test_ragged_dot(tiles):
    """[2048, 512] @ [4, 512, 1024], with half of the rows there."""
    rows, inner, columns, groups = 1024, 512, 1024, 4
    text = TEXT.replace('tiling="128,512,1024"', f'tiling="{",".join(map(str, tiles))}"')
    turns, group = ragged_grid(rows, inner, columns, tiles, groups)
    tile_rows, tile_inner, tile_columns = tiles
    moved = fetched(
        turns,
        [
            (2 * tile_rows * tile_inner, lambda t: t[1:]),
            (2 * tile_inner * min(tile_columns, columns), lambda t: (t[0], group(t[1]), t[2])),
        ],
    )
    written = 2 * rows * columns
    work = work_of("ragged-dot-none.2", 0.5, text)
    assert work.flops == len(turns) * 2 * tile_rows * tile_inner * tile_columns
    partial = columns % tile_columns != 0  # the last tile's copy reads what is there: less than a whole block
    numbers = 4 * 5 + 2 * 4 * 19  # tables of groups and tiles are left out
    assert work.hbm_bytes == pytest.approx(moved + written, rel=0.15 if partial else 1e-9, abs=numbers)


def test_gradient_of_the_weights():
    """[2048, 512]' @ [2048, 1024] by groups: rows are read once for each tile of columns, their gradients once for each
    tile of the rows' width; tiles that do not divide the width are worked on whole."""
    text = TEXT.replace('tiling="128,512,1024"', 'tiling="128,384,256"')
    work = work_of("ragged-dot-none", 1.0, text)
    assert work.flops == 2 * 2048 * (2 * 384) * 1024
    assert work.hbm_bytes == 4 * (2 * 2048 * 512) + 2 * (2 * 2048 * 1024) + 2 * 4 * 512 * 1024
    main = parse(TEXT).computations["main"]
    assert ragged_dot_work(main, main.by_name["ragged-dot-none"], 0.25)[1] == 2 * 512 * 512 * 1024


def test_what_stands_in_vmem_is_free():
    """Its rows and weights were prefetched: the kernel writes alone."""
    assert work_of("ragged-dot-none.2", everything_in_hbm=False).hbm_bytes == 2 * 2048 * 1024


@pytest.mark.parametrize("block", [1024, 512, 256])
@pytest.mark.parametrize(
    ("name", "flops", "again"),
    [
        # q k and weights v; keys and values are read for each block of queries
        ("splash_mha_fwd_segmented_residuals.1", 192 + 128, 2 * (192 + 128)),
        # q k, dv, dweight, dq, dk; queries, gradients of outputs, and two float32 numbers in 8 copies, for each of keys
        ("splash_mha_dkv_segmented_no_residuals.1", 3 * 192 + 2 * 128, 2 * (192 + 128) + 2 * 8 * 4),
    ],
)
def test_splash(name, flops, again, block):
    """Causal, 2 sequences of 2,048 tokens, 2 heads of 192 and 128, in blocks: turns on and below the diagonal."""
    num, heads = 2048 // block, 4
    turns = [(head, row, column) for head in range(heads) for row in range(num) for column in range(row + 1)]
    work = work_of(name, text=TEXT.replace(": 1024", f": {block}"))
    assert work.flops == len(turns) * 2 * block**2 * flops
    whole = work_of(name, text=TEXT.replace(": 1024", ": 2048"))  # one block: all is read once
    moved = fetched(turns, [(block * again, lambda t: t[::2])])
    assert work.hbm_bytes - whole.hbm_bytes == moved - heads * 2048 * again


def test_other_kernels():
    """By the cost that they state; one that states none is told."""
    stated = TEXT.replace("splash_mha_fwd", "my_kernel").replace("splash_mha_dkv", "splash_mha_dkv")
    assert work_of("my_kernel_segmented_residuals.1", text=stated).flops == 10_737_418_240
    silent = stated.replace('"cost_estimate":{"flops":"10737418240"', '"x":{"y":"1"')
    main = parse(silent).computations["main"]
    assert [one.name for one in main.instructions if is_unknown(one)] == ["my_kernel_segmented_residuals.1"]
    assert work_of("my_kernel_segmented_residuals.1", text=silent).flops == 0
    assert sum(map(is_ragged_dot, main.instructions)) == 3
