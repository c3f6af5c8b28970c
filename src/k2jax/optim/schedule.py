"""The learning rate as a function of tokens: warm-up, constant, cosine (K2 report 2.5)."""

import jax
import jax.numpy as jnp

from k2jax.config import OptimConfig


def learning_rate(config: OptimConfig, tokens: jax.Array) -> jax.Array:
    """Learning rate (float32) of the step that ends after `tokens` tokens.

    Linear from 0 over warmup_tokens, constant until constant_until_tokens, a half cosine down to
    final_learning_rate at cosine_until_tokens, and that from there on.
    """
    # As floats: 15.5T tokens do not fit an int32.
    warmup, constant, cosine = map(
        float, (config.warmup_tokens, config.constant_until_tokens, config.cosine_until_tokens)
    )
    tokens = jnp.asarray(tokens, jnp.float32)
    warm = jnp.minimum(1.0, tokens / warmup) if warmup else 1.0
    progress = jnp.clip((tokens - constant) / max(cosine - constant, 1.0), 0.0, 1.0)
    peak, final = config.learning_rate, config.final_learning_rate
    return warm * (final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def learning_rate_of_step(config: OptimConfig, step: jax.Array, batch_tokens: int) -> jax.Array:
    """Learning rate of step number `step`, counted from 0, with `batch_tokens` tokens in every step."""
    return learning_rate(config, (step + 1.0) * float(batch_tokens))
