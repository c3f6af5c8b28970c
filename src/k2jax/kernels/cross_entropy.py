"""Next-token cross-entropy of a head over a large vocabulary: no array of all tokens by all ids, in either direction.

A chunk of tokens at a time. Its logits are made block by block of the vocabulary and kept; once their sum is known a
second loop over the blocks makes both gradients of them, so that no logit is made twice (Liger kernels, arXiv
2410.10989, 3.2) and each block's share of the head's gradient is added while it is in cache.

    T tokens, D hidden, V the ids of one device, I chunks of tokens, J blocks of ids
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.dtypes import wide

BLOCK_IDS = 8192  # of a block: 8 MiB of head at hidden size 256; benchmarks/loss.py
LEAST_LOGITS = 1 << 22  # of a chunk: with a small vocabulary the loop over chunks is not what takes the time


def _chunk_tokens(num_tokens: int, hidden: int, num_ids: int) -> int:
    """Tokens of a chunk, in equal chunks of whole eights.

    Every chunk reads and writes the whole gradient of the head, so more tokens cost less; half of hidden makes the
    chunk's logits half as large as that gradient, which is held anyway.
    """
    most = max(min(max(hidden // 2, 128), 1024), LEAST_LOGITS // num_ids)
    num_chunks = -(-num_tokens // most)
    return -(-num_tokens // (num_chunks * 8)) * 8


def _chunks(x_TD, w_DV, target_T):
    """x [I, T, D] and targets [I, T], filled up with tokens of target -1, which have no loss."""
    chunk = _chunk_tokens(len(x_TD), x_TD.shape[1], w_DV.shape[1])
    filled = -len(x_TD) % chunk
    x_TD, target_T = jnp.pad(x_TD, ((0, filled), (0, 0))), jnp.pad(target_T, (0, filled), constant_values=-1)
    return x_TD.reshape(-1, chunk, x_TD.shape[1]), target_T.reshape(-1, chunk)


class _Head(NamedTuple):
    """The head in the dtype of the matmuls, filled up to whole blocks."""

    w_DV: jax.Array
    num_ids: int
    num_blocks: int
    axis: str | None

    def block(self, j):
        """Head [D, V] of block j, and the id of each of its columns within this device's, -2 for what fills it up."""
        size = self.w_DV.shape[1] // self.num_blocks
        id_V = j * size + jnp.arange(size)
        return jax.lax.dynamic_slice_in_dim(self.w_DV, j * size, size, 1), jnp.where(id_V < self.num_ids, id_V, -2)

    def is_target(self, id_V, target_T):
        first = 0 if self.axis is None else jax.lax.axis_index(self.axis) * self.num_ids
        return (target_T - first)[:, None] == id_V


def _head(x_TD, w_DV, axis) -> _Head:
    num_blocks = -(-w_DV.shape[1] // BLOCK_IDS)
    filled = -w_DV.shape[1] % num_blocks
    return _Head(jnp.pad(w_DV.astype(x_TD.dtype), ((0, 0), (0, filled))), w_DV.shape[1], num_blocks, axis)


def _share(head: _Head, x_TD, target_T):
    """Losses [T] of a chunk, its log-sum-exp [T], and its logits [J, T, V]."""
    dtype = wide(x_TD.dtype)

    def turn(carry, j):
        old_max_T, old_sum_T, target_logit_T = carry
        w_DV, id_V = head.block(j)
        logit_TV = jnp.einsum("TD,DV->TV", x_TD, w_DV, preferred_element_type=dtype)
        logit_TV = jnp.where(id_V >= 0, logit_TV, -jnp.inf)
        max_T = jnp.maximum(old_max_T, logit_TV.max(-1))
        sum_T = old_sum_T * jnp.exp(old_max_T - max_T) + jnp.exp(logit_TV - max_T[:, None]).sum(-1)
        target_logit_T += jnp.sum(jnp.where(head.is_target(id_V, target_T), logit_TV, 0), -1)
        return (max_T, sum_T, target_logit_T), logit_TV

    # zeros of x and w, not just zeros: inside shard_map a carry must vary over the axes that its result varies over
    zeros_T = jnp.zeros_like(x_TD[:, 0], dtype=dtype) + jnp.zeros_like(head.w_DV[0, 0], dtype=dtype)
    start = zeros_T - jnp.inf, zeros_T, zeros_T
    (max_T, sum_T, target_logit_T), logit_JTV = jax.lax.scan(turn, start, jnp.arange(head.num_blocks))
    if head.axis is not None:  # two numbers of each token go over the mesh, and its largest logit
        own_max_T, max_T = max_T, jax.lax.pmax(max_T, head.axis)
        sum_T, target_logit_T = jax.lax.psum((sum_T * jnp.exp(own_max_T - max_T), target_logit_T), head.axis)
    lse_T = max_T + jnp.log(sum_T)
    return jnp.where(target_T >= 0, lse_T - target_logit_T, 0), lse_T, logit_JTV


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loss(x_TD, w_DV, target_T, axis):
    head = _head(x_TD, w_DV, axis)
    return jax.lax.map(lambda part: _share(head, *part)[0].sum(), _chunks(x_TD, w_DV, target_T)).sum()


def _forward(x_TD, w_DV, target_T, axis):
    head, dtype = _head(x_TD, w_DV, axis), wide(w_DV.dtype)

    def chunk_turn(dw_DV, part):
        x_part_TD, target_part_T = part
        loss_T, lse_T, logit_JTV = _share(head, x_part_TD, target_part_T)

        def block_turn(j, carry):
            dw_DV, dx_TD = carry
            w_part_DV, id_V = head.block(j)
            weight_TV = jnp.exp(logit_JTV[j] - lse_T[:, None]) - head.is_target(id_V, target_part_T)
            dlogit_TV = jnp.where(target_part_T[:, None] >= 0, weight_TV, 0).astype(x_part_TD.dtype)
            dx_TD += jnp.einsum("TV,DV->TD", dlogit_TV, w_part_DV, preferred_element_type=dx_TD.dtype)
            part_DV = jnp.einsum("TD,TV->DV", x_part_TD, dlogit_TV, preferred_element_type=dtype)
            start = j * part_DV.shape[1]
            sum_DV = jax.lax.dynamic_slice_in_dim(dw_DV, start, part_DV.shape[1], 1) + part_DV
            return jax.lax.dynamic_update_slice_in_dim(dw_DV, sum_DV, start, 1), dx_TD

        zeros_TD = jnp.zeros_like(x_part_TD, dtype=wide(x_part_TD.dtype)) + jnp.zeros_like(w_DV[0, 0])
        dw_DV, dx_TD = jax.lax.fori_loop(0, head.num_blocks, block_turn, (dw_DV, zeros_TD))
        return dw_DV, (loss_T.sum(), dx_TD.astype(x_part_TD.dtype))

    zeros_DV = jnp.zeros_like(head.w_DV, dtype=dtype)
    dw_DV, (losses, dx_ITD) = jax.lax.scan(chunk_turn, zeros_DV, _chunks(x_TD, w_DV, target_T))
    dx_TD = dx_ITD.reshape(-1, x_TD.shape[1])[: len(x_TD)]
    return losses.sum(), (dx_TD, dw_DV[:, : head.num_ids].astype(w_DV.dtype))


def _backward(axis, saved, dloss):
    dx_TD, dw_DV = saved
    return dx_TD * dloss.astype(dx_TD.dtype), dw_DV * dloss.astype(dw_DV.dtype), None


_loss.defvjp(_forward, _backward)


def linear_cross_entropy_sum(
    x_TD: jax.Array, w_DV: jax.Array, target_T: jax.Array, axis: str | None = None
) -> jax.Array:
    """Sum over T of -log softmax(x @ w)[target], in nats; at least float32.

    The head is cast to the dtype of x for the matmuls; its gradient is summed, and returned, in its own dtype.
    axis: the mesh axis that cuts V, inside `jax.shard_map`; x and targets are then the same along it.
    """
    return _loss(x_TD, w_DV, target_T, axis)
