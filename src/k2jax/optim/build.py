"""MuonClip: the optimizer of K2 as a chain of optax transforms, read from the parameters' own declarations."""

import jax
import jax.numpy as jnp
import optax

from k2jax.config import OptimConfig
from k2jax.optim.muon import MatrixView, scale_by_muon
from k2jax.optim.qk_clip import QKPart, qk_clip
from k2jax.optim.schedule import learning_rate_of_step


def is_declaration(x) -> bool:
    """Whether x is a weight's declaration, by what optimizers need of one."""
    return hasattr(x, "group")


def map_weights(function, weights: optax.Params) -> optax.Params:
    """Map over a pytree of weight declarations (objects with group, num_stack, num_inputs, first_layer, qk)."""
    return jax.tree.map(function, weights, is_leaf=is_declaration)


def muonclip(
    config: OptimConfig, weights: optax.Params, batch_tokens: int, layouts: optax.Params | None = None
) -> optax.GradientTransformationExtraArgs:
    """The whole chain. weights: pytree of declarations; layouts: MatrixView.layouts of each, or None.

    update() needs params and, where qk_clip_tau is set, max_logits.
    """
    layouts = map_weights(lambda w: (), weights) if layouts is None else layouts
    views = jax.tree.map(
        lambda w, specs: MatrixView(w.num_stack, w.num_inputs, specs), weights, layouts, is_leaf=is_declaration
    )
    muon = scale_by_muon(
        views, config.momentum, config.nesterov, config.ns_steps, jnp.dtype(config.ns_dtype), config.update_rms
    )
    adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
    parts = map_weights(lambda w: w.qk and QKPart(w.first_layer, w.qk.powers), weights)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm is not None else optax.identity(),
        optax.partition({"muon": muon, "adamw": adam}, map_weights(lambda w: w.group, weights)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: learning_rate_of_step(config, step, batch_tokens)),
        qk_clip(config.qk_clip_tau, parts)
        if config.qk_clip_tau is not None
        else optax.with_extra_args_support(optax.identity()),
    )
