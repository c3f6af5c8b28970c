"""y[rows of group g] = x[rows of group g] @ w[g], rows sorted by group: the matmul of a dropless MoE.

XLA's `lax.ragged_dot` costs as many dense matmuls as there are groups on a CPU. The blocked form below
runs one small matmul per tile, a tile being the part of one block of rows that belongs to one group:
at most num_blocks + num_groups - 1 of them, whatever the routing.

    M rows, G groups, I inputs, O outputs
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCK_ROWS = 256  # benchmarks/grouped_matmul.py: 512 is alike on a CPU, 128 takes 1.1 and 64 takes 1.4 times as long


def _tiles(group_sizes_G: jax.Array, block: int):
    """(number of tiles, tile -> (group, block, start row, end row)), all traced integers."""
    end_G = jnp.cumsum(group_sizes_G)
    start_G = end_G - group_sizes_G
    first_G = start_G // block
    count_G = jnp.where(group_sizes_G > 0, (end_G - 1) // block - first_G + 1, 0)
    tile_end_G = jnp.cumsum(count_G)

    def tile(i):
        group = jnp.searchsorted(tile_end_G, i, side="right")
        return group, first_G[group] + i - (tile_end_G[group] - count_G[group]), start_G[group], end_G[group]

    return tile_end_G[-1], tile


def _rows_of_tile(x_MI, tile, block):
    """One block of rows, those outside the tile's group set to zero."""
    _, index, start, end = tile
    rows = index * block + jnp.arange(block)
    x_block = jax.lax.dynamic_slice_in_dim(x_MI, index * block, block)
    return jnp.where(((rows >= start) & (rows < end))[:, None], x_block, 0)


def _pad_rows(x_MI, block):
    return jnp.pad(x_MI, ((0, -x_MI.shape[0] % block), (0, 0)))


def _blocked(x_MI, w_GIO, group_sizes_G, block):
    num_rows = x_MI.shape[0]
    x_MI = _pad_rows(x_MI, block)
    num_tiles, tile_of = _tiles(group_sizes_G, block)

    def body(i, y_MO):
        tile = tile_of(i)
        group, index, *_ = tile
        y_tile = _rows_of_tile(x_MI, tile, block) @ w_GIO[group]
        y_block = jax.lax.dynamic_slice_in_dim(y_MO, index * block, block)
        return jax.lax.dynamic_update_slice_in_dim(y_MO, y_block + y_tile, index * block, 0)

    # zeros_like, not zeros: inside shard_map a loop's carry must vary over the mesh axes that its result varies over
    zeros_MO = jnp.zeros_like(x_MI, shape=(x_MI.shape[0], w_GIO.shape[2]))
    return jax.lax.fori_loop(0, num_tiles, body, zeros_MO)[:num_rows]


def _blocked_weight_grad(x_MI, dy_MO, group_sizes_G, block, dtype):
    x_MI, dy_MO = _pad_rows(x_MI, block), _pad_rows(dy_MO, block)
    num_tiles, tile_of = _tiles(group_sizes_G, block)
    wide = jnp.promote_types(x_MI.dtype, jnp.float32)

    def body(i, dw_GIO):
        tile = tile_of(i)
        group, index, *_ = tile
        dy_block = jax.lax.dynamic_slice_in_dim(dy_MO, index * block, block)
        dw_IO = jnp.matmul(_rows_of_tile(x_MI, tile, block).T, dy_block, preferred_element_type=wide)
        return dw_GIO.at[group].add(dw_IO)

    shape = (group_sizes_G.shape[0], x_MI.shape[1], dy_MO.shape[1])
    return jax.lax.fori_loop(0, num_tiles, body, jnp.zeros_like(x_MI, shape=shape, dtype=wide)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_MI, w_GIO, group_sizes_G, block):
    return _blocked(x_MI, w_GIO, group_sizes_G, block)


def _forward(x_MI, w_GIO, group_sizes_G, block):
    return _blocked(x_MI, w_GIO, group_sizes_G, block), (x_MI, w_GIO, group_sizes_G)


def _backward(block, saved, dy_MO):
    x_MI, w_GIO, group_sizes_G = saved
    dx_MI = _blocked(dy_MO, w_GIO.swapaxes(1, 2), group_sizes_G, block)
    return dx_MI, _blocked_weight_grad(x_MI, dy_MO, group_sizes_G, block, w_GIO.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(x_MI: jax.Array, w_GIO: jax.Array, group_sizes_G: jax.Array, block: int = BLOCK_ROWS) -> jax.Array:
    """[M, I] x [G, I, O] -> [M, O]: the first group_sizes[0] rows use w[0], the next group_sizes[1] w[1], and so on.

    group_sizes: int [G] with sum <= M; rows past the sum give zeros and take no part in gradients.
    Weight gradients are summed in at least float32 whatever the dtype of x.
    """
    return _grouped_matmul(x_MI, w_GIO, group_sizes_G, min(block, -(-x_MI.shape[0] // 8) * 8))
