"""The share of weights that an update leaves unchanged because it is smaller than their rounding."""

import jax
import jax.numpy as jnp
import optax


def _counts(param: jax.Array, update: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[2]: entries with an update that is not zero, and those of them that do not change in `dtype`."""
    due, new = update != 0, (param + update).astype(param.dtype)  # rounded once, as optax.apply_updates does
    same = new.astype(dtype) == param.astype(dtype)
    return jnp.stack([due.sum(dtype=jnp.float32), (due & same).sum(dtype=jnp.float32)])


def lost_updates(
    params: optax.Params, updates: optax.Params, labels: optax.Params, dtype: jnp.dtype | None = None
) -> dict[str, jax.Array]:
    """For each label the share (float32) of entries whose update is not zero and yet leaves them as they were.

    labels: pytree like the parameters. dtype: of the copy that is looked at; None: as the parameter is stored. A share
    near 1 says that training in this dtype stands still: bfloat16 has 8 bits, so an update below 2^-9 of its weight is
    lost. A group without an update has share 0. Raises ValueError if the three are not shaped alike.
    """
    try:
        counts = jax.tree.map(lambda p, u, _: _counts(p, u, dtype or p.dtype), params, updates, labels)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"lost_updates: params, updates and labels are not shaped alike: {error}") from None
    totals: dict[str, jax.Array] = {}
    for label, count in zip(jax.tree.leaves(labels), jax.tree.leaves(counts), strict=True):
        totals[label] = totals.get(label, 0) + count
    return {label: lost / jnp.maximum(due, 1) for label, (due, lost) in sorted(totals.items())}
