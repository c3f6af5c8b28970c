"""From a config and a model's declarations to the optimizer: what `optim.optimizer` names is called with a Setup."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from k2jax.config import OptimConfig
from k2jax.optim.muon import MatrixView
from k2jax.optim.muonclip import muonclip
from k2jax.optim.qk_clip import QKPart
from k2jax.optim.schedule import learning_rate_of_step


def is_declaration(x) -> bool:
    """True if x is a weight's declaration, judged by what optimizers need of one."""
    return hasattr(x, "group")


def map_weights(function, weights: optax.Params, *rest: optax.Params):
    """Map over a pytree of weight declarations (objects with group, num_stack, num_inputs, first_layer, qk)."""
    return jax.tree.map(function, weights, *rest, is_leaf=is_declaration)


@dataclass(frozen=True)
class Setup:
    """The argument of the function that makes the optimizer, `optim.optimizer`.

    def my_adamw(setup):
        return optax.chain(optax.adamw(setup.learning_rate), qk_clip(setup.config.qk_clip_tau, setup.qk_parts))

    weights: pytree like the parameters, of declarations (dims, shape, group, ...); assignments: of each one's
    Assignment, or of None without a mesh. update() of what the function returns is given `max_logits` [layers, H], and
    the step's loss and gradients as `value` and `grad`.
    """

    config: OptimConfig
    weights: optax.Params
    batch_tokens: int
    assignments: optax.Params

    def learning_rate(self, count: jax.Array) -> jax.Array:
        """The rate (float32) of an update that `count` others came before: the config's schedule."""
        return learning_rate_of_step(self.config, count, self.batch_tokens)

    @property
    def labels(self) -> optax.Params:
        """ "muon" or "adamw" for each parameter."""
        return map_weights(lambda w: w.group, self.weights)

    @property
    def qk_parts(self) -> optax.Params:
        """For `qk_clip`."""
        return map_weights(lambda w: w.qk and QKPart(w.first_layer, w.qk.powers), self.weights)

    @property
    def matrices(self) -> optax.Params:
        """For `scale_by_muon`'s dimension_numbers: each parameter's matrices, and their way over the mesh."""
        return map_weights(
            lambda w, assignment: MatrixView(w.num_stack, w.num_inputs, assignment), self.weights, self.assignments
        )


def muonclip_of(setup: Setup) -> optax.GradientTransformationExtraArgs:
    """MuonClip as a config describes it."""
    config = setup.config
    return muonclip(
        setup.learning_rate,
        setup.labels,
        setup.qk_parts,
        config.qk_clip_tau,
        dimension_numbers=setup.matrices,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        ns_dtype=jnp.dtype(config.ns_dtype),
        coefficients=config.ns_coefficients,
        rms=config.update_rms,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
