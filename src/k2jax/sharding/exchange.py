"""The expert exchange: every token's row goes to the devices that own its experts, and comes back.

Runs inside `jax.shard_map`, on local arrays. Only indices are sorted; rows move by gathers whose
transpose is again a gather, because every permutation's inverse is at hand: no float scatter either way.
The transport is an all-to-all of fixed cells that hold the worst case, so no token is ever dropped.

    T tokens here, A experts per token, P shards of the expert axis, E experts here, W = P * cell slots
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.custom_vjp
def take_rows(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """y[i] = x[source[i]], zero where source[i] == len(x).

    `target` [len(x), n] lists the places that row j went to (len(y) for none), so that the gradient is a gather too.
    """
    del target
    return x.at[source].get(mode="fill", fill_value=0)


def _take_forward(x, source, target):
    return take_rows(x, source, target), (source, target)


def _take_backward(saved, dy):
    _, target = saved
    return dy.at[target].get(mode="fill", fill_value=0).sum(1), None, None


take_rows.defvjp(_take_forward, _take_backward)


def _inverse(order: jax.Array) -> jax.Array:
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


class SendPlan(NamedTuple):
    """Where each (token, choice) goes: slots are ordered by destination shard, then expert, then token."""

    slot_of_choice_TA: jax.Array
    choice_of_slot_W: jax.Array  # T * A where the slot is empty
    counts_PE: jax.Array  # rows for each expert of each shard


def plan_send(expert_TA: jax.Array, num_experts: int, num_shards: int) -> SendPlan:
    """Plan for expert choices [T, A] (global ids, distinct per token)."""
    num_tokens, num_choices = expert_TA.shape
    per_shard = num_experts // num_shards
    cell = num_tokens * min(num_choices, per_shard)
    expert = expert_TA.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts_PE = jnp.sum(expert[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32).reshape(num_shards, per_shard)
    count_P = counts_PE.sum(1)
    start_P = jnp.cumsum(count_P) - count_P
    shard = expert // per_shard
    slot_of_choice = shard * cell + _inverse(order) - start_P[shard]
    place = jnp.arange(cell)
    filled = place < count_P[:, None]
    sorted_index = jnp.where(filled, start_P[:, None] + place, 0)
    choice_of_slot = jnp.where(filled, order[sorted_index], expert.size).reshape(-1)
    return SendPlan(slot_of_choice.reshape(expert_TA.shape), choice_of_slot, counts_PE)


def _swap(x: jax.Array, axis: str | None, num_shards: int) -> jax.Array:
    """All-to-all of the leading dim, seen as [P, ...]: cell p goes to shard p."""
    if axis is None:
        return x
    cells = x.reshape(num_shards, -1, *x.shape[1:])
    return jax.lax.all_to_all(cells, axis, split_axis=0, concat_axis=0).reshape(x.shape)


def exchange_experts(
    x_TD: jax.Array,
    expert_TA: jax.Array,
    weight_TA: jax.Array,
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    num_experts: int,
    axis: str | None,
    num_shards: int,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of each token's experts [T, D], and the rows that each expert here worked on [E].

    experts(rows, group_sizes): the local experts on rows sorted by expert. weight_TA: float32 or wider.
    `axis` None: one shard.
    """
    plan = plan_send(expert_TA, num_experts, num_shards)
    num_tokens, num_choices = expert_TA.shape
    token_of_slot = plan.choice_of_slot_W // num_choices  # T * A // A = T, an empty slot's row of zeros
    sent_WD = take_rows(x_TD, token_of_slot, plan.slot_of_choice_TA)
    received_WD = _swap(sent_WD, axis, num_shards)
    counts_PE = _swap(plan.counts_PE, axis, num_shards)

    # Slots arrive ordered by expert within each cell; bring the cells together by expert, empty slots last.
    place = jnp.arange(received_WD.shape[0] // num_shards)
    expert_W = jnp.sum(place[:, None] >= jnp.cumsum(counts_PE, 1)[:, None, :], -1).reshape(-1)
    order = jnp.argsort(expert_W, stable=True)
    inverse = _inverse(order)
    group_sizes_E = counts_PE.sum(0)
    y_WD = experts(take_rows(received_WD, order, inverse[:, None]), group_sizes_E)
    returned_WD = _swap(take_rows(y_WD, inverse, order[:, None]), axis, num_shards)

    y_RD = take_rows(returned_WD, plan.slot_of_choice_TA.reshape(-1), plan.choice_of_slot_W[:, None])
    y_TAD = y_RD.reshape(num_tokens, num_choices, -1)
    y_TD = jnp.einsum("TA,TAD->TD", weight_TA, y_TAD, preferred_element_type=weight_TA.dtype)
    return y_TD.astype(x_TD.dtype), group_sizes_E
