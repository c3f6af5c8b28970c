"""Attention of new tokens to the cached latents of all before them (DeepSeek-V2 report 2.1.2), on a mesh.

At rest the cache is laid out as the residual stream is: sequences over the data axes, slots over `context` and
`tensor`, so that no two devices of a replica keep the same latent. B sequences, H heads, S new tokens, T, Z slots of
the cache, C, R parts of a latent, J = C + R
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import KernelsConfig
from k2jax.kernels.chunked_attention import TokenIndex, chunked_attention
from k2jax.model.attention import chunk_tokens
from k2jax.sharding.place import on_mesh, varying
from k2jax.sharding.rules import AXES_OF, spec


class Latents(NamedTuple):
    """All that one layer keeps of the tokens it has seen: kv_lora_rank + qk_rope_head_dim values of each."""

    latent_BTC: jax.Array
    rope_key_BTR: jax.Array  # already turned


def latents_as_keys(latent_BZC, rope_key_BZR) -> tuple[jax.Array, jax.Array]:
    """Keys [B, 1, Z, C + R] and values [B, 1, Z, C] of attention between latents, of one head to look at."""
    return jnp.concatenate([latent_BZC, rope_key_BZR], -1)[:, None], latent_BZC[:, None]


def _set_slots(past: Latents, new: Latents, slots_BS: jax.Array, is_cut: bool) -> Latents:
    """`past` with the new latents in their slots; those of other devices' slots are theirs to keep."""
    rows_B, num_slots = jnp.arange(slots_BS.shape[0])[:, None], past.latent_BTC.shape[1]
    if is_cut:
        new = varying(new, "BS", AXES_OF["T"])
        slots_BS = varying(slots_BS, "BS", AXES_OF["T"]) - jax.lax.axis_index(AXES_OF["T"]) * num_slots
        slots_BS = jnp.where(slots_BS < 0, num_slots, slots_BS)  # a negative index would count from the end
    return Latents(*(old.at[rows_B, slots_BS].set(x, mode="drop") for old, x in zip(past, new, strict=True)))


def _local(is_cut: bool, chunk: int, q_BHSJ, new: Latents, past: Latents, position_BS, scale):
    """On the heads, sequences and slots of one device."""
    past = _set_slots(past, new, position_BS, is_cut)
    whole = Latents(*(jax.lax.all_gather(x, AXES_OF["T"], axis=1, tiled=True) for x in past)) if is_cut else past
    # All heads look at the same keys, so they are more queries of a single head.
    (num_rows, num_heads, num_new), num_slots = q_BHSJ.shape[:3], whole.latent_BTC.shape[1]
    folded = num_rows, num_heads * num_new
    q_index = jnp.repeat(position_BS[:, None], num_heads, 1).reshape(folded)
    k_index = jnp.broadcast_to(jnp.arange(num_slots, dtype=position_BS.dtype), (num_rows, num_slots))
    q_at, k_at = (TokenIndex(index, jnp.zeros_like(index)) for index in (q_index, k_index))
    query = q_BHSJ.reshape(num_rows, 1, folded[1], -1)
    seen, _ = chunked_attention(query, tuple(whole), (), latents_as_keys, q_at, k_at, scale, (chunk, chunk))
    return seen.reshape(num_rows, num_heads, num_new, -1), past


def latent_attention(
    q_BHSJ: jax.Array,
    new: Latents,
    past: Latents,
    position_BS: jax.Array,
    scale: float | jax.Array,
    kernels: KernelsConfig = KernelsConfig(),
) -> tuple[jax.Array, Latents]:
    """Attended latents [B, H, S, C], and `past` with the latents of the new tokens, which see all up to their own.

    new: those latents, laid out [B, S, ...]. position_BS: int32, the new tokens' positions and so their slots in
    `past`, whose number is a multiple of `context` * `tensor`.
    """
    is_cut = on_mesh()
    local = partial(_local, is_cut, chunk_tokens(past.latent_BTC.shape[1], kernels))
    if is_cut:
        kept = Latents(spec("BTC"), spec("BTR"))
        in_specs = spec("BHSJ"), Latents(spec("BSC"), spec("BSR")), kept, spec("BS"), spec("")
        local = jax.shard_map(local, in_specs=in_specs, out_specs=(spec("BHSJ"), kept))
    return local(q_BHSJ, new, past, position_BS, jnp.asarray(scale))
