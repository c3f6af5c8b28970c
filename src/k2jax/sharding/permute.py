"""Moving rows by index alone: gathers whose transpose is again a gather, because every move's inverse is at hand.

No float is ever scattered, forward or backward, and no array of one row per choice is made but the one asked for.
Places that no row goes to are not filled: they hold some row or other, and nobody reads them.

    T rows, A places that each of them went to, W places
"""

import jax
import jax.numpy as jnp

from k2jax.dtypes import wide


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], any row of x where index == len(x). Without a fill, which is another pass over the result."""
    return x.at[jnp.minimum(index, x.shape[0] - 1)].get(mode="promise_in_bounds")


def _sum_of_rows(y: jax.Array, place_TA: jax.Array) -> jax.Array:
    """sum over a of y[place[t, a]], in the dtype of y: nothing from where place == len(y), whatever y holds."""

    def rows(place_T):
        is_row_T = (place_T < y.shape[0]).reshape(-1, *(1,) * (y.ndim - 1))
        return jnp.where(is_row_T, _rows(y, place_T), 0)  # chosen and not multiplied: 0 * nan is nan

    if place_TA.shape[1] == 1:
        return rows(place_TA[:, 0])
    total = sum(rows(place_TA[:, a]).astype(wide(y.dtype)) for a in range(place_TA.shape[1]))
    return total.astype(y.dtype)


@jax.custom_vjp
def take_rows(x: jax.Array, source_W: jax.Array, place_TA: jax.Array) -> jax.Array:
    """y[i] = x[source[i]], any row where source[i] == len(x): [T, ...] -> [W, ...].

    `place` lists the places that row t went to (len(y) for none), so that the gradient is a gather too.
    """
    del place_TA
    return _rows(x, source_W)


take_rows.defvjp(
    lambda x, source_W, place_TA: (_rows(x, source_W), place_TA),
    lambda place_TA, dy: (_sum_of_rows(dy, place_TA), None, None),
)


@jax.custom_vjp
def sum_rows(y: jax.Array, place_TA: jax.Array, source_W: jax.Array) -> jax.Array:
    """Sum of the rows of y at a row's places: [W, ...] -> [T, ...], the transpose of `take_rows`.

    Summed in at least float32 and rounded to the dtype of y, so that what comes back as a gradient is no wider.
    """
    del source_W
    return _sum_of_rows(y, place_TA)


sum_rows.defvjp(
    lambda y, place_TA, source_W: (_sum_of_rows(y, place_TA), source_W),
    lambda source_W, dx: (_rows(dx, source_W), None, None),
)


def inverse(place: jax.Array, size: int, none: int) -> jax.Array:
    """back[place[i]] = i for i < len(place); `none` where no i goes. Entries of `size` and beyond are skipped."""
    back = jnp.full(size, none, place.dtype)
    return back.at[place].set(jnp.arange(place.shape[0], dtype=place.dtype), mode="drop", unique_indices=False)
