"""QK-Clip as the last optax transform: heads whose logits grew beyond tau have their q and k weights scaled down.

K2 report 2.1: for S_h > tau and g = tau / S_h, the no-position parts of q and k take sqrt(g) each, the rotary
part of q takes g (the rotary k is shared by all heads and stays). Every logit of the head is then scaled by g.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class QKPart(NamedTuple):
    """What QK-Clip may scale in one parameter [L?, inputs, H, last]: heads are its last dim but one.

    first_layer: row of max_logits for its first (or only) layer. powers: (size, power) runs along the last dim.
    """

    first_layer: int
    powers: tuple[tuple[int, float], ...]


def clip_factors(max_logits: jax.Array, tau: float) -> jax.Array:
    """g = tau / S where S > tau, else exactly 1; a negative S is left alone. Same shape as max_logits."""
    over = max_logits > tau
    return jnp.where(over, tau / jnp.where(over, max_logits, tau), 1.0)


def _head_scales(part: QKPart, factors_LH: jax.Array, param: jax.Array) -> jax.Array:
    """Scale of each entry: [L, 1, H, last] for a stack of layers, [1, H, last] for one layer."""
    stacked = param.ndim == 4
    rows = factors_LH[part.first_layer : part.first_layer + (param.shape[0] if stacked else 1)]
    runs = [jnp.broadcast_to((rows**power)[..., None], (*rows.shape, size)) for size, power in part.powers]
    scales = jnp.concatenate(runs, -1)[:, None]
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
            scales = _head_scales(part, factors_LH, param).astype(param.dtype)
            return jnp.where(scales == 1, update, scales * (param + update) - param)

        return jax.tree.map(clip, parts, updates, params, is_leaf=lambda x: x is None or isinstance(x, QKPart)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
