"""Causal attention in chunks of queries and keys: no array of all pairs, in either direction.

An online softmax over key chunks, and a backward pass that makes each chunk's logits again from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). Keys and values of a chunk are made inside the loop from what
the caller keeps of the tokens, so those of a whole sequence exist at no time either.

    B sequences, H heads, S queries, Z keys, K query and key dim, U value dim, I query chunks, J key chunks
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from k2jax.dtypes import wide

# Names of the output, and of what the backward pass needs beside it: rematerialisation saves them by name.
ATTENTION_OUT, ATTENTION_LSE = "attention_out", "attention_lse"
UNSEEN = jnp.iinfo(jnp.int32).max  # index of a key that no query sees; a query at -1 sees none


class TokenIndex(NamedTuple):
    """Positions of tokens, int32 [B, tokens]: a query sees the keys of its segment whose index is not above its own."""

    index: jax.Array
    segment: jax.Array


def _pad(x: jax.Array, dim: int, chunk: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % chunk)
    return jnp.pad(x, widths, constant_values=value) if widths[dim][1] else x


def _pad_index(at: TokenIndex, chunk: int, index: int) -> TokenIndex:
    return TokenIndex(_pad(at.index, 1, chunk, index), _pad(at.segment, 1, chunk))


def _part(tree, i, chunk: int, dim: int):
    """Chunk i of every array along `dim`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, dim), tree)


def _set_part(tree, part, i, chunk: int, dim: int):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, dim), tree, part)


def _turns(q_at: TokenIndex, k_at: TokenIndex, chunks: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """For every key chunk the query chunks [first, end) that may see some of it.

    Judged by the largest and smallest index and segment of each chunk: earlier ones and other documents' fall out.
    """
    q_index_BIS, q_segment_BIS = (x.reshape(x.shape[0], -1, chunks[0]) for x in q_at)
    k_index_BJZ, k_segment_BJZ = (x.reshape(x.shape[0], -1, chunks[1]) for x in k_at)
    seen_BIJ = q_index_BIS.max(-1)[:, :, None] >= k_index_BJZ.min(-1)[:, None]
    seen_BIJ &= q_segment_BIS.max(-1)[:, :, None] >= k_segment_BJZ.min(-1)[:, None]
    seen_BIJ &= q_segment_BIS.min(-1)[:, :, None] <= k_segment_BJZ.max(-1)[:, None]
    # Bounds of chunks, not tokens: I * J comparisons, and never a false "no". With chunks of 2 and documents aabbbb the
    # chunks aa and bb skip each other by their segments, and the first bb the keys of the second by their indices.
    seen_IJ = seen_BIJ.any(0)  # one loop serves the batch, so a chunk that any row needs is done for all of them
    # A range per key chunk and not a list: what lies between, seen or not, is right in any case, for _logits masks it.
    # argmax finds the first True, from the other end the last; it is 0 for a chunk without one, hence some_J.
    some_J, num = seen_IJ.any(0), seen_IJ.shape[0]
    first_J = jnp.where(some_J, jnp.argmax(seen_IJ, 0), num)
    return first_J, jnp.where(some_J, num - jnp.argmax(seen_IJ[::-1], 0), num)


def _loop(start, stop, body: Callable, carry):
    """lax.fori_loop, but a single turn stands without a loop around it."""
    single = isinstance(stop, int) and (start, stop) == (0, 1)
    return body(0, carry) if single else jax.lax.fori_loop(start, stop, body, carry)


def _logits(q_BHSK, k_BHZK, q_at: TokenIndex, k_at: TokenIndex, scale):
    """Scaled logits in at least float32, -inf where the query does not see the key."""
    dtype = wide(q_BHSK.dtype)
    logit_BHSZ = jnp.einsum("BHSK,BHZK->BHSZ", q_BHSK, k_BHZK, preferred_element_type=dtype) * scale
    seen_BSZ = (q_at.segment[:, :, None] == k_at.segment[:, None]) & (q_at.index[:, :, None] >= k_at.index[:, None])
    return jnp.where(seen_BSZ[:, None], logit_BHSZ, -jnp.inf)


def _finite(x: jax.Array) -> jax.Array:
    """0 for the -inf of a query that has seen nothing yet, so that no -inf is taken from itself."""
    return jnp.where(x == -jnp.inf, 0, x)


class _Task(NamedTuple):
    """Inputs of both passes, padded to whole chunks."""

    q_BHSK: jax.Array
    sources: tuple
    q_at: TokenIndex
    k_at: TokenIndex
    num: tuple[int, int]
    first_J: jax.Array | None  # None: there is one query chunk
    end_J: jax.Array | None

    def queries_of(self, j):
        return (0, 1) if self.first_J is None else (self.first_J[j], self.end_J[j])


def _prepare(q_BHSK, sources, q_at, k_at, chunks) -> _Task:
    q_BHSK, q_at = _pad(q_BHSK, 2, chunks[0]), _pad_index(q_at, chunks[0], -1)
    sources, k_at = jax.tree.map(lambda x: _pad(x, 1, chunks[1]), sources), _pad_index(k_at, chunks[1], UNSEEN)
    num = q_BHSK.shape[2] // chunks[0], k_at.index.shape[1] // chunks[1]
    turns = (None, None) if num[0] == 1 else _turns(q_at, k_at, chunks)
    return _Task(q_BHSK, sources, q_at, k_at, num, *turns)


def _attend(make, chunks, q_BHSK, sources, weights, q_at, k_at, scale):
    """Output, log-sum-exp [B, H, S] and largest logit [B, H, S] of every query."""
    num_queries, task = q_BHSK.shape[2], _prepare(q_BHSK, sources, q_at, k_at, chunks)
    dtype = wide(q_BHSK.dtype)

    def keys_turn(j, carry):
        k_BHZK, v_BHZU = make(*_part(task.sources, j, chunks[1], 1), *weights)
        k_here = _part(task.k_at, j, chunks[1], 1)

        def queries_turn(i, carry):
            old_BHSU, old_max_BHS, old_sum_BHS = _part(carry, i, chunks[0], 2)
            q_part_BHSK, q_here = _part(task.q_BHSK, i, chunks[0], 2), _part(task.q_at, i, chunks[0], 1)
            logit_BHSZ = _logits(q_part_BHSK, k_BHZK, q_here, k_here, scale)
            max_BHS = jnp.maximum(old_max_BHS, logit_BHSZ.max(-1))
            base_BHS = _finite(max_BHS)
            weight_BHSZ = jnp.exp(logit_BHSZ - base_BHS[..., None])
            shrink_BHS = jnp.exp(old_max_BHS - base_BHS)
            sum_BHS = old_sum_BHS * shrink_BHS + weight_BHSZ.sum(-1)
            new_BHSU = jnp.einsum(
                "BHSZ,BHZU->BHSU", weight_BHSZ.astype(v_BHZU.dtype), v_BHZU, preferred_element_type=dtype
            )
            new_BHSU = old_BHSU * shrink_BHS[..., None] + new_BHSU
            return _set_part(carry, (new_BHSU, max_BHS, sum_BHS), i, chunks[0], 2)

        return _loop(*task.queries_of(j), queries_turn, carry)

    _, value = jax.eval_shape(make, *_part(task.sources, 0, chunks[1], 1), *weights)
    # zeros of q, not just zeros: inside shard_map a carry must vary over the mesh axes that its result varies over
    zeros_BHS = jnp.zeros_like(task.q_BHSK[..., 0], dtype=dtype)
    zeros_BHSU = jnp.zeros_like(task.q_BHSK, shape=(*zeros_BHS.shape, value.shape[-1]), dtype=dtype)
    out_BHSU, max_BHS, sum_BHS = _loop(0, task.num[1], keys_turn, (zeros_BHSU, zeros_BHS - jnp.inf, zeros_BHS))
    sum_BHS = jnp.where(sum_BHS == 0, 1, sum_BHS)  # of the padding, which sees nothing
    out_BHSU = (out_BHSU / sum_BHS[..., None]).astype(value.dtype)
    return tuple(x[:, :, :num_queries] for x in (out_BHSU, _finite(max_BHS) + jnp.log(sum_BHS), max_BHS))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(make, chunks, q_BHSK, sources, weights, q_at, k_at, scale):
    out_BHSU, _, max_BHS = _attend(make, chunks, q_BHSK, sources, weights, q_at, k_at, scale)
    return out_BHSU, max_BHS


def _forward(make, chunks, *arguments):
    out_BHSU, lse_BHS, max_BHS = _attend(make, chunks, *arguments)
    out_BHSU, lse_BHS = checkpoint_name(out_BHSU, ATTENTION_OUT), checkpoint_name(lse_BHS, ATTENTION_LSE)
    return (out_BHSU, max_BHS), (*arguments, out_BHSU, lse_BHS)


def _backward(make, chunks, saved, cotangents):
    """Of the output alone: the largest logits have no gradient."""
    q_BHSK, sources, weights, q_at, k_at, scale, out_BHSU, lse_BHS = saved
    dout_BHSU = cotangents[0]
    num_queries, num_keys = q_BHSK.shape[2], k_at.index.shape[1]
    task, dtype = _prepare(q_BHSK, sources, q_at, k_at, chunks), wide(q_BHSK.dtype)
    mean_BHS = jnp.einsum("BHSU,BHSU->BHS", dout_BHSU, out_BHSU, preferred_element_type=dtype)
    of_query = jax.tree.map(lambda x: _pad(x, 2, chunks[0]), (dout_BHSU, lse_BHS, mean_BHS))

    def keys_turn(j, carry):
        (k_BHZK, v_BHZU), pull = jax.vjp(lambda s, w: make(*s, *w), _part(task.sources, j, chunks[1], 1), weights)
        k_here = _part(task.k_at, j, chunks[1], 1)

        def queries_turn(i, carry):
            dq_BHSK, dk_BHZK, dv_BHZU = carry
            q_part_BHSK, q_here = _part(task.q_BHSK, i, chunks[0], 2), _part(task.q_at, i, chunks[0], 1)
            do_BHSU, lse_BHS, mean_BHS = _part(of_query, i, chunks[0], 2)
            weight_BHSZ = jnp.exp(_logits(q_part_BHSK, k_BHZK, q_here, k_here, scale) - lse_BHS[..., None])
            narrow_BHSZ = weight_BHSZ.astype(do_BHSU.dtype)
            dv_BHZU += jnp.einsum("BHSZ,BHSU->BHZU", narrow_BHSZ, do_BHSU, preferred_element_type=dtype)
            dweight_BHSZ = jnp.einsum("BHSU,BHZU->BHSZ", do_BHSU, v_BHZU, preferred_element_type=dtype)
            dlogit_BHSZ = (weight_BHSZ * (dweight_BHSZ - mean_BHS[..., None]) * scale).astype(q_part_BHSK.dtype)
            dk_BHZK += jnp.einsum("BHSZ,BHSK->BHZK", dlogit_BHSZ, q_part_BHSK, preferred_element_type=dtype)
            part_BHSK = jnp.einsum("BHSZ,BHZK->BHSK", dlogit_BHSZ, k_BHZK, preferred_element_type=dtype)
            sum_BHSK = _part(dq_BHSK, i, chunks[0], 2) + part_BHSK
            return _set_part(dq_BHSK, sum_BHSK, i, chunks[0], 2), dk_BHZK, dv_BHZU

        dq_BHSK, dsources, dweights = carry
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=dtype), (k_BHZK, v_BHZU))
        dq_BHSK, *dkv = _loop(*task.queries_of(j), queries_turn, (dq_BHSK, *zeros))
        dpart, dweights_part = pull(tuple(d.astype(x.dtype) for d, x in zip(dkv, (k_BHZK, v_BHZU), strict=True)))
        dsources = _set_part(dsources, dpart, j, chunks[1], 1)
        return dq_BHSK, dsources, jax.tree.map(jnp.add, dweights, dweights_part)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide(x.dtype)), (task.q_BHSK, weights))
    start = zeros[0], jax.tree.map(jnp.zeros_like, task.sources), zeros[1]
    dq_BHSK, dsources, dweights = _loop(0, task.num[1], keys_turn, start)
    dsources = jax.tree.map(lambda x: x[:, :num_keys], dsources)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dq_BHSK[:, :, :num_queries].astype(q_BHSK.dtype), dsources, dweights, None, None, None


_attention.defvjp(_forward, _backward)


def chunked_attention(
    q_BHSK: jax.Array,
    sources: tuple,
    weights: tuple,
    make: Callable,
    q_at: TokenIndex,
    k_at: TokenIndex,
    scale: float | jax.Array,
    chunks: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, U] in the values' dtype, and each query's largest scaled logit [B, H, S] (signed, no gradient).

    make(*sources, *weights) -> keys [B, H, Z, K] and values [B, H, Z, U] of any run of tokens; a function of a module,
    not a closure. sources: arrays [B, Z, ...] of the tokens. chunks: (queries, keys) at a time. Softmax and sums in
    at least float32; neither scale nor places have a gradient. Every query must see at least one key.
    """
    chunks = min(chunks[0], q_BHSK.shape[2]), min(chunks[1], k_at.index.shape[1])
    return _attention(make, chunks, q_BHSK, sources, weights, q_at, k_at, scale)
