"""Rotary position embedding in DeepSeek-V3's layout (k2-facts: interleaved pairs in, halves out)."""

import jax
import jax.numpy as jnp

from k2jax.model.weights import wide


def rope_angles(positions: jax.Array, rotary_dim: int, theta: float) -> jax.Array:
    """Angles [..., rotary_dim / 2] for integer positions [...]; float32, or float64 where jax_enable_x64 is on."""
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2) / rotary_dim)
    return positions[..., None] * frequency


def apply_rope(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn adjacent pairs of the last dim by `angles` (broadcast); computed and returned in at least float32.

    The output holds all first halves of the pairs, then all second ones: q and k are permuted alike, so their
    logits are unchanged.
    """
    x = x.astype(wide(x.dtype))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
