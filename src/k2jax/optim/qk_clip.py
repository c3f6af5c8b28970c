"""QK-Clip as the last optax transform: heads whose logits grew beyond tau have their q and k weights scaled down.

K2 report 2.1: for S_h > tau and g = tau / S_h, the no-position parts of q and k take sqrt(g) each, the rotary
part of q takes g (the rotary k is shared by all heads and stays). Every logit of the head is then scaled by g.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class QKPart(NamedTuple):
    """What QK-Clip may scale in one parameter: [inputs, H, last] of one layer, or [L, inputs, H, last] of several.

    first_layer: row of max_logits for its first (or only) layer. powers: (size, power) runs along the last dim; a
    head's factor g acts as g**power on each. A kernel whose heads are merged into the last dim, [..., H * last], sets
    merged. By kind of attention:

        MLA   q_b ((nope, 0.5), (rope, 1.0)), kv_b ((nope, 0.5), (value, 0.0))   as k2jax declares
        MHA   q ((head_dim, 0.5),), k ((head_dim, 0.5),)
        GQA   q ((head_dim, 1.0),), and nothing for k, which other heads use too
    """

    first_layer: int
    powers: tuple[tuple[int, float], ...]
    merged: bool = False


class QKClipState(NamedTuple):
    """Nothing; that it stands in an optimizer's state tells that the chain has a qk_clip."""


def clip_factors(max_logits: jax.Array, tau: float) -> jax.Array:
    """g = tau / S where S > tau, else exactly 1: for a negative S, and for an infinite one or NaN, which is a bad step
    and no reason to set weights to zero. Same shape as max_logits."""
    over = (max_logits > tau) & jnp.isfinite(max_logits)
    return jnp.where(over, tau / jnp.where(over, max_logits, tau), 1.0)


def _head_scales(part: QKPart, factors_LH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scale of each entry, to be broadcast against a parameter of `shape`. Raises ValueError where they do not fit."""
    stacked = len(shape) == (3 if part.merged else 4)
    num_layers = shape[0] if stacked else 1
    rows = factors_LH[part.first_layer : part.first_layer + num_layers]
    last = sum(size for size, _ in part.powers)
    heads = (rows.shape[-1] * last,) if part.merged else (rows.shape[-1], last)
    if len(shape) - stacked != len(heads) + 1 or shape[-len(heads) :] != heads or len(rows) != num_layers:
        raise ValueError(
            f"qk_clip: parameter {shape} with {part}: must be [layers?, inputs, {', '.join(map(str, heads))}], with "
            f"layers in the {len(factors_LH)} rows of max_logits"
        )
    runs = [jnp.broadcast_to((rows**power)[..., None], (*rows.shape, size)) for size, power in part.powers]
    scales = jnp.concatenate(runs, -1).reshape(num_layers, 1, *heads)
    return scales if stacked else scales[0]


def qk_clip(tau: float, parts: optax.Params) -> optax.GradientTransformationExtraArgs:
    """Scale the *new* weights, params + update, of each head with max_logits > tau.

    parts: pytree like the parameters, of QKPart or None. update() needs params and `max_logits` [layers, H], the
    largest of this step's scaled logits over the whole batch. Unclipped heads come out as they went in, bit for bit.
    """

    def update(updates, state, params=None, *, max_logits, **extra):
        del extra
        factors_LH = clip_factors(max_logits, tau)

        def clip(part, update, param):
            if part is None:
                return update
            scales = _head_scales(part, factors_LH, param.shape).astype(param.dtype)
            return jnp.where(scales == 1, update, scales * (param + update) - param)

        return jax.tree.map(clip, parts, updates, params, is_leaf=lambda x: x is None or isinstance(x, QKPart)), state

    return optax.GradientTransformationExtraArgs(lambda params: QKClipState(), update)
