"""Multi-head latent attention (DeepSeek-V3 report 2.1.1): queries, keys and values come from two small latents.

T positions over context and tensor, S queries over context, Z keys whole; Q, C latents, J = C + R, G = N + U
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.kernels.project import project
from k2jax.model.attention import attention
from k2jax.model.rope import apply_rope
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

    q_angles_BS: jax.Array  # [B, S, R / 2]
    k_angles_BZ: jax.Array  # [B, Z, R / 2]
    visible_BSZ: jax.Array  # bool: same document, and not in the future


class MLA(nnx.Module):
    """One attention layer; `q_b` and `kv_b` declare what QK-Clip may scale (K2 report 2.1)."""

    def __init__(self, stack: Stack):
        config = stack.config
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.config = config
        self.q_a = stack.weight("D>Q")
        self.q_a_norm = stack.gain("Q")
        self.q_b = stack.weight("Q>HK", qk_powers=((nope, 0.5), (rope, 1.0)))
        self.kv_a = stack.weight("D>J")
        self.kv_a_norm = stack.gain("C")
        self.kv_b = stack.weight("C>HG", qk_powers=((nope, 0.5), (value, 0.0)))
        self.o = stack.weight("HU>D")

    def __call__(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, D] and the largest logit of each head [H]."""
        config, dtype = self.config, x_BTD.dtype
        nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
        # Latents are made where the tokens are, then moved: they are much smaller than x.
        q_BTQ = project("BTD,DQ->BTQ", x_BTD, self.q_a.use(dtype))
        q_BSQ = place(rms_norm(q_BTQ, self.q_a_norm, LATENT_NORM_EPS), "BSQ")
        kv_BTJ = project("BTD,DJ->BTJ", x_BTD, self.kv_a.use(dtype))
        c_BTC = rms_norm(kv_BTJ[..., :latent], self.kv_a_norm, LATENT_NORM_EPS)
        c_BZC, k_rope_BZR = place(c_BTC, "BZC"), place(kv_BTJ[..., latent:], "BZR")

        q_BHSK = project("BSQ,QHK->BHSK", q_BSQ, self.q_b.use(dtype))
        q_rope_BHSR = apply_rope(q_BHSK[..., nope:], positions.q_angles_BS[:, None]).astype(dtype)
        kv_BHZG = project("BZC,CHG->BHZG", c_BZC, self.kv_b.use(dtype))
        k_rope_BZR = apply_rope(k_rope_BZR, positions.k_angles_BZ).astype(dtype)
        k_rope_BHZR = place(jnp.broadcast_to(k_rope_BZR[:, None], (*kv_BHZG.shape[:3], k_rope_BZR.shape[-1])), "BHZR")
        out_BHSU, max_logit_H = attention(
            jnp.concatenate([q_BHSK[..., :nope], q_rope_BHSR], -1),
            jnp.concatenate([kv_BHZG[..., :nope], k_rope_BHZR], -1),
            kv_BHZG[..., nope:],
            positions.visible_BSZ,
            scale=(nope + config.qk_rope_head_dim) ** -0.5,
        )
        return project("BHSU,HUD->BSD", out_BHSU, self.o.use(dtype), out_spec("BTD")), max_logit_H
