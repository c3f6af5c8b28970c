"""Causal attention that also returns each head's largest logit, which QK-Clip needs.

B sequences, H heads, S queries, Z keys, K query and key dim, U value dim
"""

import jax
import jax.numpy as jnp

from k2jax.model.weights import wide


def attention(
    q_BHSK: jax.Array, k_BHZK: jax.Array, v_BHZU: jax.Array, visible_BSZ: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, U] and the signed maximum [H] of the scaled logits over visible pairs (float32, no gradient).

    Softmax in float32, normalised after the sum over values: one pass less over [B, H, S, Z], which is materialised.
    Every query must see at least one key.
    """
    dtype = wide(q_BHSK.dtype)
    logit_BHSZ = jnp.einsum("BHSK,BHZK->BHSZ", q_BHSK, k_BHZK, preferred_element_type=dtype) * scale
    logit_BHSZ = jnp.where(visible_BSZ[:, None], logit_BHSZ, -jnp.inf)
    max_BHS = jax.lax.stop_gradient(logit_BHSZ).max(-1)
    weight_BHSZ = jnp.exp(logit_BHSZ - max_BHS[..., None])
    sum_BHS = weight_BHSZ.sum(-1)
    out_BHSU = jnp.einsum("BHSZ,BHZU->BHSU", weight_BHSZ.astype(v_BHZU.dtype), v_BHZU, preferred_element_type=dtype)
    return (out_BHSU / sum_BHS[..., None]).astype(v_BHZU.dtype), max_BHS.max((0, 2))
