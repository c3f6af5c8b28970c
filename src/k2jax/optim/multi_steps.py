"""optax.MultiSteps for chains with a qk_clip, which needs the largest logits of all the calls that make a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class MaxLogitsState(NamedTuple):
    """steps: optax.MultiSteps' own. max_logits: float32 [layers, H], over the calls since the last step."""

    steps: optax.MultiStepsState
    max_logits: jax.Array


def multi_steps(steps: optax.MultiSteps, num_layers: int, num_heads: int) -> optax.GradientTransformationExtraArgs:
    """`steps` with `max_logits` [num_layers, num_heads] of every call counted, not of each step's last one alone.

    A call that `should_skip_update_fn` leaves out does not count. Raises ValueError in update() without `max_logits`.
    """
    none = -jnp.inf

    def init(params):
        return MaxLogitsState(steps.init(params), jnp.full((num_layers, num_heads), none, jnp.float32))

    def update(updates, state, params=None, *, max_logits=None, **extra):
        if max_logits is None or jnp.shape(max_logits) != (num_layers, num_heads):
            given = "none" if max_logits is None else f"shape {jnp.shape(max_logits)}"
            raise ValueError(f"multi_steps: update() needs max_logits [{num_layers}, {num_heads}] of the call; got {given}")
        largest, before = jnp.maximum(state.max_logits, max_logits), state.steps
        updates, after = steps.update(updates, before, params, max_logits=largest, **extra)
        stepped = after.gradient_step != before.gradient_step
        kept = jnp.where(after.mini_step != before.mini_step, largest, state.max_logits)
        return updates, MaxLogitsState(after, jnp.where(stepped, none, kept))

    return optax.GradientTransformationExtraArgs(init, update)
