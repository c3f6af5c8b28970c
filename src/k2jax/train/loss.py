"""Next-token cross-entropy.

B sequences, T positions, V vocabulary
"""

import jax
import jax.numpy as jnp


def cross_entropy_sum(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Sum over all positions of -log p(target), in nats; float32 (logits are)."""
    # A comparison instead of a gather: it needs no index and no scatter in the gradient, on any sharding.
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), -1)
    return jnp.sum(jax.nn.logsumexp(logits_BTV, -1) - target_logit_BT)
