"""Rotary position embedding in DeepSeek-V3's layout (k2-facts: interleaved pairs in, halves out)."""

import jax
import jax.numpy as jnp


def rope_angles(positions: jax.Array, rotary_dim: int, theta: float) -> jax.Array:
    """Angles [..., rotary_dim / 2] in float32 for integer positions [...]."""
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    return positions[..., None].astype(jnp.float32) * frequency


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn adjacent pairs of the last dim by `angles` (broadcast); computed in float32, returned in x's dtype.

    The output holds all first halves of the pairs, then all second ones: q and k are permuted alike, so logits are unchanged.
    """
    x = x.astype(jnp.float32) if x.dtype != jnp.float64 else x
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
