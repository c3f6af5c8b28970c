"""Multi-head latent attention (DeepSeek-V3 report 2.1.1): queries, keys and values come from two small latents.

T positions over context and tensor, S queries over context, Z keys whole; Q, C latents, J = C + R, G = N + U
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.dtypes import wide
from k2jax.kernels.chunked_attention import ATTENTION_OUT, TokenIndex
from k2jax.kernels.project import project
from k2jax.model.attention import attention
from k2jax.model.latent_attention import Latents, latent_attention
from k2jax.model.remat import KV_LATENT, Q_LATENT, named
from k2jax.model.rope import Rope, apply_rope
from k2jax.model.weights import Param, Stack
from k2jax.sharding.place import out_spec, place

LATENT_NORM_EPS = 1e-6  # the published code builds the latent norms with this, whatever rms_norm_eps is


def rms_norm(x: jax.Array, gain: Param, eps: float) -> jax.Array:
    """Normalise the last dim in float32 (or wider), cast back, then apply the gain (order of the published code).

    The gain acts in float32: its gradient is a sum over all tokens, which bf16 cannot hold.
    """
    x_wide = x.astype(wide(x.dtype))
    normed = x_wide * jax.lax.rsqrt(jnp.mean(x_wide * x_wide, -1, keepdims=True) + eps)
    return (normed.astype(x.dtype) * gain.use(x_wide.dtype)).astype(x.dtype)


class Positions(NamedTuple):
    """Token positions as attention reads them; computed once for all layers."""

    rope: Rope
    q_angles_BS: jax.Array  # [B, S, R / 2]
    k_angles_BT: jax.Array  # [B, T, R / 2]
    q_at: TokenIndex  # [B, S]: place in the row, and document
    k_at: TokenIndex  # [B, Z]


def keys_and_values(latent_BZC, rope_key_BZR, key_CHN, value_CHU) -> tuple[jax.Array, jax.Array]:
    """Keys [B, H, Z, K] and values [B, H, Z, U] of any run of tokens; all heads share the rotary part of the key."""
    key_BHZN = project("BZC,CHN->BHZN", latent_BZC, key_CHN)
    rope_key_BHZR = jnp.broadcast_to(rope_key_BZR[:, None], (*key_BHZN.shape[:3], rope_key_BZR.shape[-1]))
    return jnp.concatenate([key_BHZN, rope_key_BHZR], -1), project("BZC,CHU->BHZU", latent_BZC, value_CHU)


class MLA(nnx.Module):
    """Weights are [inputs, outputs]; the last dim of q_b is [nope, rope], of kv_b [nope, value], as published."""

    def __init__(self, stack: Stack):
        config = stack.config
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.config, self.kernels = config, stack.kernels
        q_powers = ((nope, 0.5), (rope, 1.0))
        if config.q_lora_rank is None:
            self.q = stack.weight("D>HK", "self_attn.q_proj.weight", qk_powers=q_powers)
        else:
            self.q_a = stack.weight("D>Q", "self_attn.q_a_proj.weight")
            self.q_a_norm = stack.gain("Q", "self_attn.q_a_layernorm.weight")
            self.q_b = stack.weight("Q>HK", "self_attn.q_b_proj.weight", qk_powers=q_powers)
        self.kv_a = stack.weight("D>J", "self_attn.kv_a_proj_with_mqa.weight")
        self.kv_a_norm = stack.gain("C", "self_attn.kv_a_layernorm.weight")
        self.kv_b = stack.weight("C>HG", "self_attn.kv_b_proj.weight", qk_powers=((nope, 0.5), (value, 0.0)))
        self.o = stack.weight("HU>D", "self_attn.o_proj.weight")

    def _queries(self, x_BTD: jax.Array, positions: Positions) -> jax.Array:
        """[B, H, S, K], the rotary part turned."""
        nope, dtype = self.config.qk_nope_head_dim, x_BTD.dtype
        if self.config.q_lora_rank is None:
            q_BHSK = project("BSD,DHK->BHSK", place(x_BTD, "BSD"), self.q.use(dtype))
        else:
            # The latent is made where the tokens are, then moved: it is much smaller than x.
            q_BTQ = named(project("BTD,DQ->BTQ", x_BTD, self.q_a.use(dtype)), Q_LATENT)
            q_BSQ = place(rms_norm(q_BTQ, self.q_a_norm, LATENT_NORM_EPS), "BSQ")
            q_BHSK = project("BSQ,QHK->BHSK", q_BSQ, self.q_b.use(dtype))
        amplitude = positions.rope.amplitude
        turned_BHSR = apply_rope(q_BHSK[..., nope:], positions.q_angles_BS[:, None], amplitude).astype(dtype)
        return jnp.concatenate([q_BHSK[..., :nope], turned_BHSR], -1)

    def _latents(self, x_BTD: jax.Array, positions: Positions) -> Latents:
        dtype, latent = x_BTD.dtype, self.config.kv_lora_rank
        kv_BTJ = named(project("BTD,DJ->BTJ", x_BTD, self.kv_a.use(dtype)), KV_LATENT)
        c_BTC = rms_norm(kv_BTJ[..., :latent], self.kv_a_norm, LATENT_NORM_EPS)
        angles_BT, amplitude = positions.k_angles_BT, positions.rope.amplitude
        return Latents(c_BTC, apply_rope(kv_BTJ[..., latent:], angles_BT, amplitude).astype(dtype))

    @jax.named_scope("attention")
    def __call__(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, D] and the largest logit of each head [H]."""
        nope, dtype = self.config.qk_nope_head_dim, x_BTD.dtype
        q_BHSK = self._queries(x_BTD, positions)
        out_BHSU, max_logit_H = attention(
            q_BHSK,
            self._latents(x_BTD, positions),
            (self.kv_b.use(dtype),),
            keys_and_values,
            positions.q_at,
            positions.k_at,
            positions.rope.softmax_scale,
            self.kernels,
            lambda kv_b_CHG: (kv_b_CHG[..., :nope], kv_b_CHG[..., nope:]),
        )
        out_BHSU = named(out_BHSU, ATTENTION_OUT)
        return project("BHSU,HUD->BSD", out_BHSU, self.o.use(dtype), out_spec("BTD")), max_logit_H

    def decode(
        self, x: jax.Array, positions: Positions, position_BS: jax.Array, past: Latents, layout: Literal["T", "S"]
    ) -> tuple[jax.Array, Latents]:
        """Output of new tokens x [B, T, D] or [B, S, D], as `layout` says, whose latents go to their slots of `past`.

        Attention takes place between latents: W_kc joins the query and W_v the output (DeepSeek-V2 report 2.1.2), so
        that no key or value of a past token is ever made again.
        """
        nope, dtype = self.config.qk_nope_head_dim, x.dtype
        q_BHSK, new = self._queries(x, positions), self._latents(x, positions)
        kv_b_CHG = self.kv_b.use(dtype)
        key_CHN, value_CHU = kv_b_CHG[..., :nope], kv_b_CHG[..., nope:]
        latent_q_BHSC = jnp.einsum("BHSN,CHN->BHSC", q_BHSK[..., :nope], key_CHN)
        seen_BHSC, past = latent_attention(
            jnp.concatenate([latent_q_BHSC, q_BHSK[..., nope:]], -1),
            Latents(place(new.latent_BTC, "BSC"), place(new.rope_key_BTR, "BSR")),
            past,
            position_BS,
            positions.rope.softmax_scale,
            self.kernels,
        )
        out_BHSU = jnp.einsum("BHSC,CHU->BHSU", seen_BHSC, value_CHU)
        return project("BHSU,HUD->BSD", out_BHSU, self.o.use(dtype), out_spec(f"B{layout}D")), past
