"""Causal attention that also returns each head's largest logit, which QK-Clip needs.

    B sequences, S queries, Z keys, H heads, N no-position dim, R rotary dim, U value dim
"""

import jax
import jax.numpy as jnp


def attention(
    q_BSHN: jax.Array,
    q_rope_BSHR: jax.Array,
    k_BZHN: jax.Array,
    k_rope_BZR: jax.Array,
    v_BZHU: jax.Array,
    visible_BSZ: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, S, H, U] and the signed maximum [H] of the scaled logits over visible pairs (no gradient).

    k_rope is shared by all heads (DeepSeek-V3 report, eq. 1-11). Logits, softmax in at least float32. Materialises [B, H, S, Z].
    """
    wide = jnp.promote_types(q_BSHN.dtype, jnp.float32)
    logits_BHSZ = jnp.einsum("BSHN,BZHN->BHSZ", q_BSHN, k_BZHN, preferred_element_type=wide)
    logits_BHSZ += jnp.einsum("BSHR,BZR->BHSZ", q_rope_BSHR, k_rope_BZR, preferred_element_type=wide)
    logits_BHSZ = jnp.where(visible_BSZ[:, None], logits_BHSZ * scale, -jnp.inf)
    max_logit_H = jax.lax.stop_gradient(logits_BHSZ).max((0, 2, 3))
    weights_BHSZ = jax.nn.softmax(logits_BHSZ, -1).astype(v_BZHU.dtype)
    return jnp.einsum("BHSZ,BZHU->BSHU", weights_BHSZ, v_BZHU), max_logit_H
