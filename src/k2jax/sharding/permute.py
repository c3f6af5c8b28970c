"""Moving rows by index alone: gathers whose transpose is again a gather, because every move's inverse is at hand.

No float is ever scattered, forward or backward, and no array of one row per choice is made but the one asked for.

    T rows, A places that each of them went to, W places, D width
"""

import jax
import jax.numpy as jnp

from k2jax.dtypes import wide


def _rows(x, index):
    """x[index], zero where index == len(x)."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_rows(x_TD: jax.Array, source_W: jax.Array, target_TA: jax.Array) -> jax.Array:
    """y[i] = x[source[i]], zero where source[i] == len(x).

    `target` [len(x), n] lists the places that row j went to (len(y) for none), so that the gradient is a gather too.
    """
    del target_TA
    return _rows(x_TD, source_W)


def _take_forward(x_TD, source_W, target_TA):
    return _rows(x_TD, source_W), target_TA


def _take_backward(target_TA, dy_WD):
    if target_TA.shape[1] == 1:
        return _rows(dy_WD, target_TA[:, 0]), None, None
    dx_TD = sum(_rows(dy_WD, target_TA[:, a]).astype(wide(dy_WD.dtype)) for a in range(target_TA.shape[1]))
    return dx_TD.astype(dy_WD.dtype), None, None


take_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def combine_rows(
    y_WD: jax.Array, weight_TA: jax.Array, place_TA: jax.Array, choice_of_place_W: jax.Array
) -> jax.Array:
    """sum over a of weight[t, a] * y[place[t, a]], in the weights' dtype; nothing from where place == len(y).

    choice_of_place: for each row of y the t * A + a that it belongs to, T * A for none.
    """
    del choice_of_place_W
    num_choices = weight_TA.shape[1]
    return sum(weight_TA[:, a, None] * _rows(y_WD, place_TA[:, a]) for a in range(num_choices))


def _combine_forward(y_WD, weight_TA, place_TA, choice_of_place_W):
    return combine_rows(y_WD, weight_TA, place_TA, choice_of_place_W), (y_WD, weight_TA, place_TA, choice_of_place_W)


def _combine_backward(saved, dout_TD):
    y_WD, weight_TA, place_TA, choice_of_place_W = saved
    num_choices = weight_TA.shape[1]
    weight_W = _rows(weight_TA.reshape(-1), choice_of_place_W)
    dy_WD = weight_W[:, None] * _rows(dout_TD, choice_of_place_W // num_choices)  # T * A // A = T: zeros
    dweight = [jnp.sum(dout_TD * _rows(y_WD, place_TA[:, a]), -1) for a in range(num_choices)]
    return dy_WD.astype(y_WD.dtype), jnp.stack(dweight, 1).astype(weight_TA.dtype), None, None


combine_rows.defvjp(_combine_forward, _combine_backward)


def inverse(place: jax.Array, size: int, none: int) -> jax.Array:
    """back[place[i]] = i for i < len(place); `none` where no i goes. Entries of `size` and beyond are skipped."""
    back = jnp.full(size, none, place.dtype)
    return back.at[place].set(jnp.arange(place.shape[0], dtype=place.dtype), mode="drop", unique_indices=False)
