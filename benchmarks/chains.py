"""Optimizers that benchmarks put in muonclip's place: `optim.optimizer = "benchmarks/chains.py:adamw"`."""

import optax

from k2jax.optim.setup import Setup


def sgd(setup: Setup) -> optax.GradientTransformation:
    """The least that an optimizer can do with all gradients: one multiplication and no state."""
    return optax.sgd(setup.learning_rate)


def adamw(setup: Setup) -> optax.GradientTransformation:
    """muonclip's AdamW group, gradient clipping and decay, for every parameter."""
    config = setup.config
    return optax.chain(
        optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(setup.learning_rate),
    )
