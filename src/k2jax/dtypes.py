"""The one rule for accumulators."""

import jax.numpy as jnp


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """float32 where `dtype` is narrower: for sums over many tokens or devices, norms, softmax and the router."""
    return jnp.promote_types(dtype, jnp.float32)
