"""Zigzag order of sequences, which gives every shard of `context` the same share of causal attention.

B sequences, Z positions, D hidden
"""

import jax
import jax.numpy as jnp

from k2jax.sharding.place import on_mesh, place


def _blocks(num_shards: int) -> list[int]:
    """Of 2n equal blocks the first shard takes the first and the last, the next one the next from both ends."""
    return [block for i in range(num_shards) for block in (i, 2 * num_shards - 1 - i)]


def zigzag(x_BZ: jax.Array, back: bool = False) -> jax.Array:
    """Reorder positions of x [B, positions, ...] zigzag over `context`; back=True undoes it.

    Unchanged without a mesh, with context 1, and for a length that is not a multiple of twice `context`: the last shard
    then has up to twice the mean work.
    """
    num_shards = jax.sharding.get_abstract_mesh().shape["context"] if on_mesh() else 1
    if num_shards == 1 or x_BZ.shape[1] % (2 * num_shards):
        return x_BZ
    order, size = _blocks(num_shards), x_BZ.shape[1] // (2 * num_shards)
    if back:
        order = sorted(range(len(order)), key=order.__getitem__)
    x_BZ = place(x_BZ, "BZ" + "D" * (x_BZ.ndim - 2))
    return jnp.concatenate([x_BZ[:, block * size : (block + 1) * size] for block in order], 1)
