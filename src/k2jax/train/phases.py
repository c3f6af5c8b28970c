"""Which stage of the timeline a step belongs to, and what holds there (config.StagesConfig)."""

from typing import Literal

import jax
import jax.numpy as jnp

from k2jax.config import Config
from k2jax.model.rope import Rope, make_rope


def stage_of(config: Config, step: int | jax.Array) -> int | jax.Array:
    """Number of the stage in which step `step`, counted from 0, begins."""
    first_steps = [-(-tokens // config.batch_tokens) for tokens in config.stages.start_tokens]
    return sum(step >= min(first, 2**31 - 1) for first in first_steps[1:])  # a step is an int32


def stage_value(values: tuple[float, ...], stage: int | jax.Array) -> jax.Array:
    """The stage's entry of a field of StagesConfig, float32."""
    return jnp.asarray(values, jnp.float32)[stage]


def stage_rope(config: Config, stage: int | jax.Array) -> Rope:
    """The stage's RoPE."""
    ropes = [make_rope(config.model, kind) for kind in config.stages.rope]
    if len(set(config.stages.rope)) == 1:
        return ropes[0]
    return jax.tree.map(lambda *values: jnp.asarray(values, jnp.float32)[stage], *ropes)


def rope_after(config: Config, steps: int) -> Literal["plain", "yarn"]:
    """The kind of RoPE that a model was last trained with, `steps` steps after its beginning."""
    return config.stages.rope[stage_of(config, max(steps - 1, 0))]
