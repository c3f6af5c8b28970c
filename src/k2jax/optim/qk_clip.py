"""QK-Clip as the last optax transform: heads whose logits grew beyond tau have their q and k weights scaled down.

K2 report 2.1: for S_h > tau and g = tau / S_h, the no-position parts of q and k take sqrt(g) each, the rotary
part of q takes g (the rotary k is shared by all heads and stays). Every logit of the head is then scaled by g.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class QKPart(NamedTuple):
    """The part of a parameter that QK-Clip may scale: [inputs..., H, last], or [L, inputs..., H, last] of L layers.

    first_layer: row of max_logits for its first (or only) layer. powers: (size, power) runs along the last dim; a
    head's factor g acts as g**power on each. A kernel whose heads are merged into the last dim, [..., H * last], sets
    merged. By kind of attention:

        MLA   q_b ((nope, 0.5), (rope, 1.0)), kv_b ((nope, 0.5), (value, 0.0))   as k2jax declares
        MHA   q ((head_dim, 0.5),), k ((head_dim, 0.5),)
        GQA   q ((head_dim, 1.0),), and nothing for k, which other heads use too

    A bias of q or k is a parameter of its own with the same powers and num_inputs=0; without it the logits of a head
    are not scaled as a whole.
    """

    first_layer: int
    powers: tuple[tuple[int, float], ...]
    merged: bool = False
    num_inputs: int = 1  # dims between the layers' and the heads'


SCOPE = "qk_clip"  # names every operation of the clip, so that a trace of an update tells if it is the last


class QKClipState(NamedTuple):
    """Nothing; that it stands in an optimizer's state tells that the chain has a qk_clip."""


def clip_factors(max_logits: jax.Array, tau: float) -> jax.Array:
    """g = tau / S where S > tau, else exactly 1: for a negative S, and for an infinite one or NaN, which is a bad step
    and no reason to set weights to zero. Same shape as max_logits, float32 or float64."""
    max_logits = jnp.asarray(max_logits)
    max_logits = max_logits.astype(jnp.promote_types(max_logits.dtype, jnp.float32))
    over = (max_logits > tau) & jnp.isfinite(max_logits)
    return jnp.where(over, tau / jnp.where(over, max_logits, tau), 1.0)


def _head_scales(part: QKPart, factors_LH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scale of each entry, to be broadcast against a parameter of `shape`. Raises ValueError if they do not fit."""
    stacked = len(shape) == (2 if part.merged else 3) + part.num_inputs
    num_layers = shape[0] if stacked else 1
    rows = factors_LH[part.first_layer : part.first_layer + num_layers]
    last = sum(size for size, _ in part.powers)
    heads = (rows.shape[-1] * last,) if part.merged else (rows.shape[-1], last)
    if len(shape) - stacked != len(heads) + part.num_inputs or shape[-len(heads) :] != heads or len(rows) != num_layers:
        raise ValueError(
            f"qk_clip: parameter {shape} with {part}: must be [layers?, {'inputs, ' * part.num_inputs}"
            f"{', '.join(map(str, heads))}], with layers in the rows of max_logits {factors_LH.shape}"
        )
    runs = [jnp.broadcast_to((rows**power)[..., None], (*rows.shape, size)) for size, power in part.powers]
    scales = jnp.concatenate(runs, -1).reshape(num_layers, *[1] * part.num_inputs, *heads)
    return scales if stacked else scales[0]


def _is_part(x) -> bool:
    return x is None or isinstance(x, QKPart)


def _is_whole(part: QKPart) -> bool:
    """True if its fields can be meant: a negative layer would count from the end."""
    return part.first_layer >= 0 and all(np.shape(run) == (2,) for run in part.powers)


def _check(tau: float, parts: optax.Params) -> None:
    """Raise ValueError for a tau that is not positive, and for leaves of `parts` that are no QKPart."""
    known = not isinstance(tau, jax.core.Tracer)  # optax.inject_hyperparams traces it
    if known and (tau is None or isinstance(tau, str) or math.isnan(tau) or tau <= 0):
        raise ValueError(f"qk_clip: tau = {tau!r}: must be a number greater than 0, in units of logits")
    wrong = [
        f"{jax.tree_util.keystr(path)}: {part!r}"
        for path, part in jax.tree_util.tree_leaves_with_path(parts, is_leaf=_is_part)
        if part is not None and not (isinstance(part, QKPart) and _is_whole(part))
    ]
    if wrong:
        raise ValueError(f"qk_clip: parts must be QKParts or None: {'; '.join(wrong)}; layers count from 0")


def qk_clip(
    tau: float, parts: optax.Params | Callable[[optax.Params], optax.Params]
) -> optax.GradientTransformationExtraArgs:
    """Scale the *new* weights, params + update, of each head with max_logits > tau.

    parts: pytree like the parameters, of QKPart or None, or a function of them that gives one (`by_path`).
    update() needs params and `max_logits` [layers, H], the largest of this step's scaled logits over the whole batch:
    with accumulation the maximum over all calls since the last step, as `multi_steps` gives it; optax.MultiSteps itself
    passes on the arguments of its last call alone, and the clip cannot tell. Unclipped heads come out as they went in, bit for bit. Scales in float32 at least;
    bfloat16 parameters round the result, so that a head just over tau may not move.
    Raises ValueError for tau <= 0, for parts that are no QKPart or do not fit, and for missing params or max_logits.
    """
    _check(tau, None if callable(parts) else parts)

    def parts_of(params) -> optax.Params:
        if not callable(parts):
            return parts
        found = parts(params)
        _check(tau, found)
        return found

    def init(params):
        try:
            jax.tree.map(lambda *_: None, parts_of(params), params, is_leaf=_is_part)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"qk_clip: parts are not shaped like the parameters: {error}") from None
        return QKClipState()

    @jax.named_scope(SCOPE)
    def update(updates, state, params=None, *, max_logits=None, **extra):
        del extra
        if params is None:
            raise ValueError("qk_clip: update() needs params: update(grads, state, params, max_logits=...)")
        if max_logits is None or jnp.ndim(max_logits) != 2:
            given = "none" if max_logits is None else f"shape {jnp.shape(max_logits)}"
            raise ValueError(f"qk_clip: update() needs max_logits [layers, H], the largest of the step; got {given}")
        factors_LH = clip_factors(max_logits, tau)

        def clip(part, update, param):
            if part is None or isinstance(update, optax.MaskedNode):
                return update
            scales = _head_scales(part, factors_LH, param.shape)
            dtype = jnp.result_type(update, param)
            wide = jnp.promote_types(dtype, jnp.float32)
            scales, param = scales.astype(wide), param.astype(wide)
            return jnp.where(scales == 1, update.astype(dtype), (scales * (param + update) - param).astype(dtype))

        return jax.tree.map(clip, parts_of(params), updates, params, is_leaf=_is_part), state

    return optax.GradientTransformationExtraArgs(init, update)
