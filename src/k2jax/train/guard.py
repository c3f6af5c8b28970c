"""Bad steps, which are skipped, and the statistics of the good ones that tell them apart (config.GuardConfig)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from k2jax.config import GuardConfig


class Guard(NamedTuple):
    """losses and log_norms: float32 [window], of the last good steps, newest last; NaN where there was none yet."""

    skipped: jax.Array  # int32, bad steps so far
    in_a_row: jax.Array  # int32, those of them since the last good one
    losses: jax.Array  # nats per token
    log_norms: jax.Array  # logarithm of the gradient norm


def init_guard(config: GuardConfig) -> Guard:
    """Nothing seen yet."""
    none, unknown = jnp.zeros((), jnp.int32), jnp.full(config.window, jnp.nan, jnp.float32)
    return Guard(none, none, unknown, unknown)


def _log(norm: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))  # a norm of 0 may not spoil the mean


def zscores(guard: Guard, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """float32 [2]: loss and logarithm of the gradient norm in standard deviations over the mean; NaN if unknown yet."""
    pairs = (guard.losses, loss), (guard.log_norms, _log(grad_norm))
    scores = jnp.stack([((value - past.mean()) / past.std()).astype(jnp.float32) for past, value in pairs])
    # Computed once: what is_good decides by and what the log shows may not differ in a last bit.
    return jax.lax.optimization_barrier(scores)


def is_good(
    config: GuardConfig, scores: jax.Array, loss: jax.Array, grad_norm: jax.Array, max_logits: jax.Array
) -> jax.Array:
    """True if the step may be applied. scores: `zscores` of loss and grad_norm; max_logits: [layers, H]."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(max_logits).all()
    bounds = (config.loss_zscore, config.grad_norm_zscore)
    spikes = [score > bound for score, bound in zip(scores, bounds, strict=True) if bound is not None]  # NaN: no spike
    return finite & ~jnp.any(jnp.stack([jnp.zeros((), bool), *spikes]))


def skip_reasons(
    config: GuardConfig, loss: float, grad_norm: float, max_logit: float, scores: tuple[float, float]
) -> list[str]:
    """Why a step was skipped: each check that it failed, with its value and its bound. Numbers of the host."""
    values = {"loss": loss, "grad_norm": grad_norm, "max_logit": max_logit}
    reasons = [f"{name} = {value} is not finite" for name, value in values.items() if not math.isfinite(value)]
    bounds = {"loss": config.loss_zscore, "grad_norm": config.grad_norm_zscore}
    for (name, bound), score in zip(bounds.items(), scores, strict=True):
        if bound is not None and score > bound:
            reasons.append(f"{name} = {values[name]:.6g} has z-score {score:.2f} > guard.{name}_zscore = {bound:g}")
    return reasons


def after_step(guard: Guard, good: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> Guard:
    """The guard after a step that was good or not."""

    def remember(past, value):
        return jnp.where(good, jnp.append(past[1:], value.astype(past.dtype)), past)

    bad = (~good).astype(jnp.int32)
    return Guard(
        guard.skipped + bad,
        (guard.in_a_row + 1) * bad,
        remember(guard.losses, loss),
        remember(guard.log_norms, _log(grad_norm)),
    )
