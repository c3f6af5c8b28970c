"""Causal attention on a mesh, with each head's largest logit, which QK-Clip needs.

Queries stay where they are, cut over `context`; what keys and values are made of is gathered whole (of MLA it is
kv_lora_rank + qk_rope_head_dim values a token), and each device makes its own heads' keys and values of it, a chunk at
a time. B sequences, T, S, Z positions, H heads, K query and key dim, U value dim
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from k2jax.config import KernelsConfig
from k2jax.kernels.chunked_attention import TokenIndex, chunked_attention
from k2jax.kernels.tokamax_attention import TILE, library_attention
from k2jax.sharding.place import on_mesh, platform, replicated, uncut_axes, varying
from k2jax.sharding.rules import AXES_OF, spec

# benchmarks/attention.py: of 64 to 512 the fastest on a CPU, to the noise. Longer sequences have longer chunks, so that
# an accelerator's matmuls are large enough and the loop's own cost stays small.
CHUNK_TO_LENGTH = ((256, 128), (4096, 256), (32_768, 512))
LONGEST_CHUNK = 1024


def chunk_tokens(length: int, kernels: KernelsConfig = KernelsConfig()) -> int:
    """Queries, and keys, of a chunk for sequences of `length` tokens."""
    if kernels.attention_chunk is not None:
        return kernels.attention_chunk
    return next((chunk for longest, chunk in CHUNK_TO_LENGTH if length <= longest), LONGEST_CHUNK)


def choose_attention(kernels: KernelsConfig, platform: str, length: int, context: int) -> Literal["chunked", "tokamax"]:
    """The implementation that `kernels.attention` means on a platform, for keys of `length` tokens cut over `context`.

    On TPU chunks move eight times the bytes of tokamax's kernel, and for K2 more than all else in a layer together. So
    "auto" is that kernel wherever it can work, whether or not tokamax is installed: a run without it ends, and is told.
    """
    if kernels.attention != "auto":
        return kernels.attention
    return "tokamax" if platform == "tpu" and context == 1 and length % TILE == 0 else "chunked"


def attention(
    q_BHSK: jax.Array,
    sources: tuple,
    weights: tuple,
    make: Callable,
    q_at: TokenIndex,
    k_at: TokenIndex,
    scale: float | jax.Array,
    kernels: KernelsConfig = KernelsConfig(),
    split: Callable = lambda *weights: weights,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, U] and the signed maximum [H] of the scaled logits over visible pairs (float32, no gradient).

    make(*sources, *split(*weights)) -> keys, values as in `chunked_attention`. sources: arrays [B, T, ...]; weights:
    arrays [..., H, ...] whose dims are C, H and N, U or both. On a mesh sources are laid out as the residual stream is,
    and a weight's gradient is summed over devices as a whole: what is one weight must be given as one, and split here.
    tokamax's kernels are for queries and keys of the same tokens in order, which see those before them.
    """
    length, sources, is_cut = k_at.index.shape[1], tuple(sources), on_mesh()
    context = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    chosen, chunk = choose_attention(kernels, platform(), length, context), chunk_tokens(length, kernels)

    def local(q_BHSK, sources, weights, q_at, k_at, scale):
        if is_cut:
            # Gathered here, so that their gradient comes back by a reduce-scatter; and said to vary before use, so that
            # autodiff sums the gradients of what devices share.
            sources = tuple(jax.lax.all_gather(x, AXES_OF["T"], axis=1, tiled=True) for x in sources)
            q_BHSK, scale, sources = varying(q_BHSK, "BHSK"), varying(scale, ""), varying(sources, "BT")
            q_at, k_at = varying(q_at, "BS"), varying(k_at, "BZ")
            weights = tuple(replicated(w, uncut_axes("CHN")) for w in weights)
        weights = split(*weights)
        if chosen == "tokamax":
            out_BHSU, max_BHS = library_attention(q_BHSK, *make(*sources, *weights), q_at.segment, scale, platform())
        else:
            out_BHSU, max_BHS = chunked_attention(q_BHSK, sources, weights, make, q_at, k_at, scale, (chunk, chunk))
        max_H = jax.lax.stop_gradient(max_BHS).max((0, 2))
        if is_cut:
            max_H = jax.lax.pmax(max_H, uncut_axes("H"))
        return out_BHSU, max_H

    if is_cut:
        places = TokenIndex(spec("BS"), spec("BS")), TokenIndex(spec("BZ"), spec("BZ"))
        in_specs = spec("BHSK"), (spec("BT"),) * len(sources), (spec("CHN"),) * len(weights), *places, spec("")
        local = jax.shard_map(local, in_specs=in_specs, out_specs=(spec("BHSU"), spec("H")))
        scale = jnp.asarray(scale)
    return local(q_BHSK, sources, weights, q_at, k_at, scale)
