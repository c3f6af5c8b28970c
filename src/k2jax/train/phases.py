"""The phase of the timeline that a step belongs to, and its values (config.PhasesConfig)."""

from typing import Literal

import jax
import jax.numpy as jnp

from k2jax.config import Config
from k2jax.model.rope import Rope, make_rope


def phase_of(config: Config, step: int | jax.Array) -> int | jax.Array:
    """Number of the phase in which step `step`, counted from 0, begins."""
    first_steps = [-(-tokens // config.batch_tokens) for tokens in config.phases.start_tokens]
    return sum(step >= min(first, 2**31 - 1) for first in first_steps[1:])  # a step is an int32


def phase_value(values: tuple[float, ...], phase: int | jax.Array) -> jax.Array:
    """The phase's entry of a field of PhasesConfig, float32."""
    return jnp.asarray(values, jnp.float32)[phase]


def phase_rope(config: Config, phase: int | jax.Array) -> Rope:
    """The phase's RoPE."""
    ropes = [make_rope(config.model, kind) for kind in config.phases.rope]
    if len(set(config.phases.rope)) == 1:
        return ropes[0]
    return jax.tree.map(lambda *values: jnp.asarray(values, jnp.float32)[phase], *ropes)


def rope_after(config: Config, steps: int) -> Literal["plain", "yarn"]:
    """The kind of RoPE that a model was last trained with, `steps` steps after its beginning."""
    return config.phases.rope[phase_of(config, max(steps - 1, 0))]
