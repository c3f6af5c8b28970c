"""MuonClip: K2's optimizer as a chain of optax transforms, for any model; and the chain that a config describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from k2jax.config import OptimConfig
from k2jax.optim.muon import MatrixView, scale_by_muon
from k2jax.optim.plans import Plan
from k2jax.optim.qk_clip import QKPart, qk_clip
from k2jax.optim.schedule import learning_rate_of_step

GROUPS = ("muon", "adamw")


def check_labels(labels: optax.Params, params: optax.Params) -> None:
    """Raise ValueError with every parameter that has no label, or one that is no group."""
    wrong = []

    def check(path, param, label):
        if label not in GROUPS:
            wrong.append(f"{jax.tree_util.keystr(path)}: label {label!r}")

    try:
        jax.tree_util.tree_map_with_path(check, params, labels)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"muonclip: labels are not shaped like the parameters: {error}") from None
    if wrong:
        raise ValueError(f"muonclip: every parameter must be labelled {' or '.join(GROUPS)}: {'; '.join(wrong)}")


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    labels: optax.Params | Callable[[optax.Params], optax.Params],
    qk_parts: optax.Params | None = None,
    tau: float | None = 100.0,
    *,
    dimension_numbers: optax.Params | Callable | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: jnp.dtype = jnp.bfloat16,
    coefficients: str = "standard",
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 1 of the K2 report: clip by norm, Muon or AdamW, decoupled decay, learning rate, QK-Clip.

    labels: "muon" or "adamw" for every parameter, or a function of the parameters that says so (`matrix_labels`).
    qk_parts: pytree like the parameters of QKPart or None; with it and tau, update() needs `max_logits` [layers, H].
    dimension_numbers: what makes the matrices of Muon's parameters, see scale_by_muon. learning_rate: per step, or a
    schedule of the step; one for all, since updates of both groups have AdamW's size. Raises ValueError in init() for a
    parameter without a label.
    """
    muon = scale_by_muon(momentum, nesterov, ns_steps, coefficients, rms, ns_dtype, dimension_numbers)
    parts = optax.partition({"muon": muon, "adamw": optax.scale_by_adam(b1, b2, eps)}, labels)

    def init(params):
        check_labels(labels(params) if callable(labels) else labels, params)
        return parts.init(params)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm is not None else optax.identity(),
        optax.GradientTransformationExtraArgs(init, parts.update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        qk_clip(tau, qk_parts)
        if tau is not None and qk_parts is not None
        else optax.with_extra_args_support(optax.identity()),
    )


def matrix_labels(params: optax.Params) -> optax.Params:
    """The labels for a model without declarations: "muon" for what has two dims, "adamw" for the rest.

    An embedding and a head have two dims as well, and are AdamW's in K2: label them by hand.
    """
    return jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)


def group_labels(masks: Mapping[str, optax.Params]) -> optax.Params:
    """One pytree of labels from a pytree of bools per label, such as optax.masked takes them.

    Raises ValueError with every parameter that no mask has, or more than one.
    """
    wrong = []

    def label(path, *marks):
        own = [name for name, mark in zip(masks, marks, strict=True) if mark]
        if len(own) != 1:
            wrong.append(f"{jax.tree_util.keystr(path)}: {' and '.join(map(repr, own)) if own else 'no group'}")
        return own[0] if own else None

    labels = jax.tree_util.tree_map_with_path(label, *masks.values())
    if wrong:
        raise ValueError(f"group_labels: every parameter must be in exactly one group: {'; '.join(wrong)}")
    return labels


def is_declaration(x) -> bool:
    """Whether x is a weight's declaration, by what optimizers need of one."""
    return hasattr(x, "group")


def map_weights(function, weights: optax.Params, *rest: optax.Params):
    """Map over a pytree of weight declarations (objects with group, num_stack, num_inputs, first_layer, qk)."""
    return jax.tree.map(function, weights, *rest, is_leaf=is_declaration)


@dataclass(frozen=True)
class Setup:
    """What a config and a model give to the function that makes the optimizer, `optim.optimizer`.

    def my_adamw(setup):
        return optax.chain(optax.adamw(setup.learning_rate), qk_clip(setup.config.qk_clip_tau, setup.qk_parts))

    weights: pytree like the parameters, of declarations (dims, shape, group, ...); plans: of each one's Plan, or
    of None where there is no mesh. update() of what the function returns is given `max_logits` [layers, H], and the
    step's loss and gradients as `value` and `grad`.
    """

    config: OptimConfig
    weights: optax.Params
    batch_tokens: int
    plans: optax.Params

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
        return map_weights(lambda w, plan: MatrixView(w.num_stack, w.num_inputs, plan), self.weights, self.plans)


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


__all__ = ["Plan", "Setup", "check_labels", "group_labels", "map_weights", "matrix_labels", "muonclip", "muonclip_of"]
