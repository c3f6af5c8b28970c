"""Multi-head latent attention (DeepSeek-V3 report 2.1.1): queries, keys and values come from two small latents.

T positions over context and tensor, S queries over context, Z keys whole; Q, C latents, J = C + R, G = N + U
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.kernels.project import project
from k2jax.model.attention import attention
from k2jax.model.rope import Rope, apply_rope
from k2jax.model.weights import Param, Stack, wide
from k2jax.sharding.rules import out_spec, place

LATENT_NORM_EPS = 1e-6  # the published code builds the latent norms with this, whatever rms_norm_eps is


def rms_norm(x: jax.Array, gain: Param, eps: float) -> jax.Array:
    """Normalise the last dim in float32 (or wider), cast back, then apply the gain (order of the published code).

    The gain acts in float32: its gradient is a sum over all tokens, which bf16 cannot hold.
    """
    x_wide = x.astype(wide(x.dtype))
    normed = x_wide * jax.lax.rsqrt(jnp.mean(x_wide * x_wide, -1, keepdims=True) + eps)
    return (normed.astype(x.dtype) * gain.use(x_wide.dtype)).astype(x.dtype)


class Positions(NamedTuple):
    """What attention knows of the token positions; computed once for all layers."""

    rope: Rope
    q_angles_BS: jax.Array  # [B, S, R / 2]
    k_angles_BZ: jax.Array  # [B, Z, R / 2]
    visible_BSZ: jax.Array  # bool: same document, and not in the future


class Latents(NamedTuple):
    """All that one layer keeps of the tokens it has seen: kv_lora_rank + qk_rope_head_dim values of each."""

    latent_BZC: jax.Array
    rope_key_BZR: jax.Array  # already turned


class MLA(nnx.Module):
    """Weights are [inputs, outputs]; the last dim of q_b is [nope, rope], of kv_b [nope, value], as published."""

    def __init__(self, stack: Stack):
        config = stack.config
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.config = config
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
            q_BTQ = project("BTD,DQ->BTQ", x_BTD, self.q_a.use(dtype))
            q_BSQ = place(rms_norm(q_BTQ, self.q_a_norm, LATENT_NORM_EPS), "BSQ")
            q_BHSK = project("BSQ,QHK->BHSK", q_BSQ, self.q_b.use(dtype))
        amplitude = positions.rope.amplitude
        turned_BHSR = apply_rope(q_BHSK[..., nope:], positions.q_angles_BS[:, None], amplitude).astype(dtype)
        return jnp.concatenate([q_BHSK[..., :nope], turned_BHSR], -1)

    def _latents(self, x_BTD: jax.Array, positions: Positions) -> Latents:
        dtype, latent = x_BTD.dtype, self.config.kv_lora_rank
        kv_BTJ = project("BTD,DJ->BTJ", x_BTD, self.kv_a.use(dtype))
        c_BTC = rms_norm(kv_BTJ[..., :latent], self.kv_a_norm, LATENT_NORM_EPS)
        rope_key_BZR = apply_rope(
            place(kv_BTJ[..., latent:], "BZR"), positions.k_angles_BZ, positions.rope.amplitude
        ).astype(dtype)
        return Latents(place(c_BTC, "BZC"), rope_key_BZR)

    def __call__(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, D] and the largest logit of each head [H]."""
        nope, dtype = self.config.qk_nope_head_dim, x_BTD.dtype
        q_BHSK = self._queries(x_BTD, positions)
        c_BZC, rope_key_BZR = self._latents(x_BTD, positions)
        kv_BHZG = project("BZC,CHG->BHZG", c_BZC, self.kv_b.use(dtype))
        rope_key_BHZR = jnp.broadcast_to(rope_key_BZR[:, None], (*kv_BHZG.shape[:3], rope_key_BZR.shape[-1]))
        out_BHSU, max_logit_H = attention(
            q_BHSK,
            jnp.concatenate([kv_BHZG[..., :nope], place(rope_key_BHZR, "BHZR")], -1),
            kv_BHZG[..., nope:],
            positions.visible_BSZ,
            scale=positions.rope.softmax_scale,
        )
        return project("BHSU,HUD->BSD", out_BHSU, self.o.use(dtype), out_spec("BTD")), max_logit_H

    def decode(
        self, x_BTD: jax.Array, positions: Positions, slots_BS: jax.Array, past: Latents
    ) -> tuple[jax.Array, Latents]:
        """Output [B, T, D] of new tokens, whose latents go to `slots` of `past`; visible is over the slots.

        Attention takes place between latents: W_kc joins the query and W_v the output (DeepSeek-V2 report 2.1.2), so
        that no key or value of a past token is ever made again. Without a mesh.
        """
        nope, dtype = self.config.qk_nope_head_dim, x_BTD.dtype
        q_BHSK, new = self._queries(x_BTD, positions), self._latents(x_BTD, positions)
        rows_B = jnp.arange(x_BTD.shape[0])[:, None]
        past = Latents(*(old.at[rows_B, slots_BS].set(fresh) for old, fresh in zip(past, new, strict=True)))
        kv_b_CHG = self.kv_b.use(dtype)
        key_CHN, value_CHU = kv_b_CHG[..., :nope], kv_b_CHG[..., nope:]
        latent_q_BHSC = jnp.einsum("BHSN,CHN->BHSC", q_BHSK[..., :nope], key_CHN)
        # All heads look at the same keys, so to `attention` they are more queries of a single head.
        num_heads, num_new = latent_q_BHSC.shape[1:3]
        folded = x_BTD.shape[0], num_heads * num_new
        query = jnp.concatenate([latent_q_BHSC, q_BHSK[..., nope:]], -1).reshape(folded[0], 1, folded[1], -1)
        visible = jnp.repeat(positions.visible_BSZ[:, None], num_heads, 1).reshape(*folded, -1)
        keys, values = jnp.concatenate(past, -1)[:, None], past.latent_BZC[:, None]
        seen, _ = attention(query, keys, values, visible, positions.rope.softmax_scale)
        seen_BHSC = seen.reshape(latent_q_BHSC.shape)
        out_BHSU = jnp.einsum("BHSC,CHU->BHSU", seen_BHSC, value_CHU)
        return project("BHSU,HUD->BSD", out_BHSU, self.o.use(dtype)), past
