"""MuonClip: K2's optimizer as a chain of optax transforms, for any model."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from k2jax.optim.by_path import path_name
from k2jax.optim.muon import scale_by_muon
from k2jax.optim.qk_clip import qk_clip

GROUPS = ("muon", "adamw")


def check_labels(labels: optax.Params, params: optax.Params) -> None:
    """Raise ValueError with every parameter that has no label, or one that is no group."""
    wrong = []

    def is_masked(x) -> bool:  # by an outer optax.partition or optax.masked: another transform's parameter
        return isinstance(x, optax.MaskedNode)

    def check(path, param, label):
        if not is_masked(param) and label not in GROUPS:
            wrong.append(f"{jax.tree_util.keystr(path)}: label {label!r}")

    try:
        jax.tree_util.tree_map_with_path(check, params, labels, is_leaf=is_masked)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"muonclip: labels are not shaped like the parameters: {error}") from None
    if wrong:
        raise ValueError(f"muonclip: every parameter must be labelled {' or '.join(GROUPS)}: {'; '.join(wrong)}")


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    labels: optax.Params | Callable[[optax.Params], optax.Params],
    qk_parts: optax.Params | Callable[[optax.Params], optax.Params] | None = None,
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

    labels: "muon" or "adamw" for every parameter, or a function of the parameters that says so (`matrix_labels`,
    `by_path`). qk_parts: pytree like the parameters of QKPart or None, or a function that gives one; with it and tau,
    update() needs `max_logits` [layers, H].
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
    """The labels for a model whose matrices all have two dims: "muon" for those, "adamw" for scalars and vectors.

    An embedding and a head have two dims as well, and are AdamW's in K2: label them by hand, or use `by_path`. Raises
    ValueError with every parameter whose dims do not tell: three and more (attention kernels [width, heads, head_dim]
    are matrices, stacks of biases are not), and two of a bias.
    """
    unclear = []

    def label(path, param):
        name = path_name(path)
        if param.ndim > 2 or (param.ndim == 2 and "bias" in name.rsplit("/", 1)[-1]):
            unclear.append(f"{name} {param.shape}")
        return "muon" if param.ndim == 2 else "adamw"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if unclear:
        rule = (
            "their dims do not tell a matrix from a stack of vectors; give labels, or by_path([(PATTERN, LABEL), ...])"
        )
        raise ValueError(f"matrix_labels: {'; '.join(unclear)}: {rule}, and the dimension_numbers of the matrices")
    return labels


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
