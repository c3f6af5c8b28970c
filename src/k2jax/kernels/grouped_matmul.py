"""y[rows of group g] = x[rows of group g] @ w[g], rows sorted by group: the matmul of a dropless MoE.

XLA's `lax.ragged_dot` costs as many dense matmuls as there are groups on a CPU. The blocked form below
runs one small matmul per tile, a tile being up to BLOCK_ROWS rows of one group: at most
num_blocks + num_groups of them, whatever the routing. TPU and GPU have kernels of their own; but `lax.ragged_dot` is
dense on GPUs too, with a masked copy of the rows for each group.

    M rows, G groups, I inputs, O outputs (of one weight, or of several side by side)
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from k2jax.config import KernelsConfig
from k2jax.dtypes import wide
from k2jax.kernels.tokamax import call_kernel, kernel_problem, load_tokamax

BLOCK_ROWS = 256  # benchmarks/moe_layer.py --blocks measures others
Implementation = Literal["blocked", "ragged_dot", "tokamax"]


def _tiles(group_sizes_G: jax.Array, num_rows: int, block: int):
    """(number of tiles, tile i -> (its group, its first row in x, [block, 1] which rows from there on are its own)).

    A tile begins where its group's rows begin or the tile before ended; it is moved up where x ends before it would.
    """
    num_groups = group_sizes_G.shape[0]
    end_G = jnp.cumsum(group_sizes_G)
    count_G = -(-group_sizes_G // block)
    tile_end_G = jnp.cumsum(count_G)
    # a table: looking the group up within the loop took a fifth of the loop's time
    tile = jnp.arange(num_rows // block + num_groups + 1)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_end_G, 1), num_groups - 1)
    first = (end_G - group_sizes_G)[group] + (tile - (tile_end_G - count_G)[group]) * block
    last = jnp.minimum(first + block, end_G[group])
    table = jnp.stack([group, jnp.minimum(first, num_rows - block), first, last], 1)

    def tile_of(i):
        group, at, first, last = lax.dynamic_index_in_dim(table, i, 0, keepdims=False)
        row = at + jnp.arange(block)
        return group, at, ((row >= first) & (row < last))[:, None]

    return tile_end_G[-1], tile_of


def _side_by_side(weights, group):
    return jnp.concatenate([w_GIO[group] for w_GIO in weights], -1)


def _put(y_MO, tile_O, at, own):
    """The tile's own rows into y; its other rows, which belong to a neighbour, stay as they are."""
    kept = lax.dynamic_slice_in_dim(y_MO, at, tile_O.shape[0])
    return lax.dynamic_update_slice_in_dim(y_MO, jnp.where(own, tile_O.astype(y_MO.dtype), kept), at, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x_MI, weights, group_sizes_G, block):
    num_tiles, tile_of = _tiles(group_sizes_G, x_MI.shape[0], block)

    def body(i, y_MO):
        group, at, own = tile_of(i)
        return _put(y_MO, lax.dynamic_slice_in_dim(x_MI, at, block) @ _side_by_side(weights, group), at, own)

    # zeros_like, not zeros: inside shard_map a loop's carry must vary over the mesh axes that its result varies over
    zeros_MO = jnp.zeros_like(x_MI, shape=(x_MI.shape[0], sum(w.shape[2] for w in weights)))
    return lax.fori_loop(0, num_tiles, body, zeros_MO)


def _forward(x_MI, weights, group_sizes_G, block):
    return _blocked(x_MI, weights, group_sizes_G, block), (x_MI, weights, group_sizes_G)


def _backward(block, saved, dy_MO):
    """Both gradients in one loop, which reads every block of rows once; neither transposes an operand in memory."""
    x_MI, weights, group_sizes_G = saved
    num_tiles, tile_of = _tiles(group_sizes_G, x_MI.shape[0], block)
    dtype = wide(x_MI.dtype)
    borders = [sum(w.shape[2] for w in weights[:i]) for i in range(1, len(weights))]

    def body(i, gradients):
        dx_MI, dw = gradients
        group, at, own = tile_of(i)
        # both masked, as rows past the sum may hold anything, and 0 * inf is nan
        x_tile = jnp.where(own, lax.dynamic_slice_in_dim(x_MI, at, block), 0)
        dy_tile = jnp.where(own, lax.dynamic_slice_in_dim(dy_MO, at, block), 0)
        dx_tile = lax.dot_general(dy_tile, _side_by_side(weights, group), (((1,), (1,)), ((), ())))
        dw_IO = lax.dot_general(x_tile, dy_tile, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        dw = tuple(d.at[group].add(part) for d, part in zip(dw, jnp.split(dw_IO, borders, 1), strict=True))
        return _put(dx_MI, dx_tile, at, own), dw

    zeros = jnp.zeros_like(x_MI), tuple(jnp.zeros_like(x_MI, shape=w.shape, dtype=dtype) for w in weights)
    dx_MI, dw = lax.fori_loop(0, num_tiles, body, zeros)
    return dx_MI, tuple(d.astype(w.dtype) for d, w in zip(dw, weights, strict=True)), None


_blocked.defvjp(_forward, _backward)


def _padded_blocked(x_MI, weights, group_sizes_G, block):
    num_rows = x_MI.shape[0]
    block = min(block, -(-num_rows // 8) * 8)
    if num_rows >= block:
        return _blocked(x_MI, weights, group_sizes_G, block)
    return _blocked(jnp.pad(x_MI, ((0, block - num_rows), (0, 0))), weights, group_sizes_G, block)[:num_rows]


def _zero_past_the_sum(y_MO, group_sizes_G):
    return jnp.where((jnp.arange(y_MO.shape[0]) < group_sizes_G.sum())[:, None], y_MO, 0)


def _ragged_dot(x_MI, weights, group_sizes_G):
    # Not masked, which would be two more passes over the rows: rows past the sum are chosen away, not multiplied by 0,
    # both by XLA's own expansion and by its TPU kernel.
    return lax.ragged_dot(x_MI, jnp.concatenate(weights, -1), group_sizes_G)


def _tokamax_kernel(x_MI, w_GIO, group_sizes_G):
    # its kernels by name: left to itself it may fall back to `lax.ragged_dot` without a word
    tokamax = load_tokamax("grouped_matmul")
    return tokamax.ragged_dot(x_MI, w_GIO, group_sizes_G, implementation=("mosaic", "triton"))


@functools.cache
def tokamax_problem() -> str | None:
    """Why tokamax's kernel cannot be used on jax's default device; None if it can. Forward and backward are tried."""
    bf16, int32 = jnp.bfloat16, jnp.int32
    return kernel_problem(_tokamax_kernel, ((256, 256), bf16), ((2, 256, 256), bf16), ((2,), int32))


def _tokamax(x_MI, weights, group_sizes_G):
    x_MI = _zero_past_the_sum(x_MI, group_sizes_G)
    y_MO = call_kernel(_tokamax_kernel, x_MI, jnp.concatenate(weights, -1), group_sizes_G)
    return _zero_past_the_sum(y_MO, group_sizes_G)


def choose_grouped_matmul(kernels: KernelsConfig, platform: str) -> Implementation:
    """The implementation that `kernels.grouped_matmul` means on a platform ("cpu", "gpu", "tpu")."""
    if kernels.grouped_matmul != "auto":
        return kernels.grouped_matmul
    if platform == "tpu":
        return "ragged_dot"
    return "tokamax" if platform == "gpu" and tokamax_problem() is None else "blocked"


def grouped_matmul(
    x_MI: jax.Array,
    weights: Sequence[jax.Array],
    group_sizes_G: jax.Array,
    implementation: Implementation = "blocked",
    block: int = BLOCK_ROWS,
) -> jax.Array:
    """[M, I] x [G, I, O] -> [M, O]: the first group_sizes[0] rows use w[0], the next group_sizes[1] w[1], and so on.

    weights: one or several arrays [G, I, any]; the rows pass through all of them at once, the results stand side by
    side. group_sizes: int [G] with sum <= M. Rows past the sum may hold anything, in x and in the output's gradient:
    they take no part in the weights' gradients, and what they give, or get as a gradient, is anything too.
    Weight gradients are summed in at least float32 whatever the dtype of x. Raises UserError if tokamax is wanted
    and not installed.
    """
    if implementation == "blocked":
        return _padded_blocked(x_MI, tuple(weights), group_sizes_G, block)
    return {"ragged_dot": _ragged_dot, "tokamax": _tokamax}[implementation](x_MI, weights, group_sizes_G)
