"""Rotary position embedding in DeepSeek-V3's layout (interleaved pairs in, halves out), plain or stretched by YaRN."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ModelConfig, RopeConfig
from k2jax.dtypes import wide


class Rope(NamedTuple):
    """Frequencies and scale of the rotary positions. Computed in float64 on the host, cast where they are used."""

    frequency: np.ndarray | jax.Array  # [qk_rope_head_dim / 2], radians per position
    amplitude: float | jax.Array  # factor of cos and sin
    softmax_scale: float | jax.Array  # factor of q . k


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _slowed(rope: RopeConfig, dim: int) -> np.ndarray:
    """Share of each pair's frequency that YaRN divides by the factor: 0 for fast pairs, 1 for slow ones."""

    def pair_with(turns: float) -> float:  # the pair that makes so many turns over the original length
        return dim * math.log(rope.original_max_position_embeddings / (2 * math.pi * turns)) / (
            2 * math.log(rope.rope_theta)
        )  # fmt: skip

    low, high = max(math.floor(pair_with(rope.beta_fast)), 0), min(math.ceil(pair_with(rope.beta_slow)), dim - 1)
    return np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)


def make_rope(config: ModelConfig, kind: Literal["plain", "yarn"]) -> Rope:
    """The model's RoPE; "yarn" at any length, as the published checkpoints are run (YaRN: arXiv 2309.00071, 3.2-3.4).

    Raises ValueError for "yarn" where the config has no factor.
    """
    rope, dim = config.rope, config.qk_rope_head_dim
    frequency = rope.rope_theta ** (-np.arange(0, dim, 2) / dim)
    scale = (config.qk_nope_head_dim + dim) ** -0.5
    if kind == "plain":
        return Rope(frequency, 1.0, scale)
    if rope.factor is None:
        raise ValueError("model.rope.factor = None: YaRN needs a factor")
    slowed = _slowed(rope, dim)
    all_dims = _magnitude(rope.factor, rope.mscale_all_dim)
    return Rope(
        frequency * (1 - slowed + slowed / rope.factor),
        _magnitude(rope.factor, rope.mscale) / all_dims,
        scale * all_dims**2,
    )


def rope_angles(positions: jax.Array, rope: Rope) -> jax.Array:
    """Angles [..., rotary dim / 2] for integer positions [...]; float32, or float64 where jax_enable_x64 is on."""
    return positions[..., None] * jnp.asarray(rope.frequency)


def apply_rope(x: jax.Array, angles: jax.Array, amplitude: float | jax.Array = 1.0) -> jax.Array:
    """Turn adjacent pairs of the last dim by `angles` (broadcast); computed and returned in at least float32.

    The output holds all first halves of the pairs, then all second ones: q and k are permuted alike, so their
    logits are unchanged.
    """
    x = x.astype(wide(x.dtype))
    cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
    first, second = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
