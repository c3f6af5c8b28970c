"""The expert exchange: every token's row goes to the devices that own its experts, and comes back.

Runs inside `jax.shard_map`, on local arrays. What goes where follows from one small table that every shard knows, the
rows that each shard has for each expert. The transports (transports.py) differ in how rows travel and in nothing else:
the rows of an expert stand in the same order, and with a bounded buffer the same rows are dropped.

    T tokens here, A experts per token, P shards of the expert axis, E experts of one shard, X = P * E experts,
    S shards as senders, R rows that one shard works on
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from k2jax.config import KernelsConfig
from k2jax.sharding.permute import inverse, sum_rows, take_rows
from k2jax.sharding.transports import Experts, Route, choice_weights, dense, ragged, ring

Transport = Literal["local", "ragged", "dense", "ring"]
TRANSPORTS = {"ragged": ragged, "dense": dense, "ring": ring}
RING_SHARDS = 16  # beyond, gathering all tokens moves more than an all-to-all does: docs/experts.md


class Exchanged(NamedTuple):
    """Result of the exchange."""

    y_TD: jax.Array  # weighted sum of each token's experts, in the dtype of x
    load_E: jax.Array  # int32: rows that the tokens of all shards chose for each expert here, dropped ones too
    dropped: jax.Array  # int32: rows that this shard's experts did not work on for want of room


def choose_transport(kernels: KernelsConfig, platform: str, num_shards: int, num_choices: int) -> Transport:
    """The transport that `kernels.exchange` means on a platform ("cpu", "gpu", "tpu") and an expert axis of this size.

    A ring moves each token to every shard once, an all-to-all once per choice: on the links of a torus the ring is less
    for more than 4 choices, until the axis is long. GPUs behind a switch gain nothing by it.
    """
    if num_shards == 1:
        return "local"
    if kernels.exchange != "auto":
        return kernels.exchange
    if platform == "tpu":
        return "ring" if num_choices > 4 and num_shards <= RING_SHARDS else "ragged"
    return "ragged" if platform == "gpu" else "dense"


def buffer_rows(num_tokens: int, num_choices: int, num_experts: int, num_shards: int, buffer: float | None) -> int:
    """Rows that one shard has room for: all that could come, or `buffer` times the balanced load where that is less."""
    worst = num_shards * num_tokens * min(num_choices, num_experts // num_shards)
    return worst if buffer is None else min(worst, int(-(-buffer * num_tokens * num_choices // 1)))


def kept_rows(count_SPE: jax.Array, room: int, most: int) -> jax.Array:
    """Rows of each (sender, expert) that each shard takes: the most even cut that fits its room.

    min(count, level of the shard) with the highest level that fits, so that a hot expert gives way before any other,
    and alike for all senders. most: no count is larger.
    """
    low_P = jnp.zeros_like(count_SPE[0, :, 0])  # like, as inside shard_map a carry must vary where its result does
    high_P = low_P + most

    def halve(_, bounds):
        low_P, high_P = bounds
        middle_P = (low_P + high_P + 1) // 2
        fits_P = jnp.minimum(count_SPE, middle_P[:, None]).sum((0, 2)) <= room
        return jnp.where(fits_P, middle_P, low_P), jnp.where(fits_P, high_P, middle_P - 1)

    level_P, _ = lax.fori_loop(0, most.bit_length() + 1, halve, (low_P, high_P))
    return jnp.minimum(count_SPE, level_P[:, None])


def _sorted_choices(expert_TA: jax.Array, num_experts: int):
    """Order of the choices by expert, the rank of each within its expert, and the counts [X]."""
    expert = expert_TA.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    count_X = jnp.sum(expert[:, None] == jnp.arange(num_experts), 0, dtype=jnp.int32)
    start_X = jnp.cumsum(count_X) - count_X
    rank = inverse(order, expert.size, 0) - start_X[expert]
    return order, rank.reshape(expert_TA.shape), count_X


def _local(x_TD, expert_TA, weight_TA, experts, num_experts):
    """One shard owns all experts: rows are sorted by expert and that is all."""
    order, rank_TA, load_E = _sorted_choices(expert_TA, num_experts)
    place_TA = (jnp.cumsum(load_E) - load_E)[expert_TA] + rank_TA
    token_R = order // expert_TA.shape[1]
    weight_R = choice_weights(weight_TA, order, place_TA)
    y_RD = experts(take_rows(x_TD, token_R, place_TA), weight_R, load_E)
    return Exchanged(sum_rows(y_RD, place_TA, token_R), load_E, jnp.zeros_like(load_E[0]))


def exchange_experts(
    x_TD: jax.Array,
    expert_TA: jax.Array,
    weight_TA: jax.Array,
    experts: Experts,
    num_experts: int,
    axis: str | None,
    num_shards: int,
    transport: Transport = "dense",
    buffer: float | None = None,
) -> Exchanged:
    """Weighted sum of each token's experts, over the mesh axis `axis` (None or one shard: no exchange).

    experts(rows [R, D], weight [R], group_sizes [E]) -> [R, D]: the local experts on rows sorted by expert, times
    each row's weight. Rows past the sum hold anything, NaN too, and may be given as anything, their gradients as well.
    expert_TA: global ids, distinct per token; weight_TA: float32 or wider.
    buffer: rows a shard has room for as a multiple of the balanced load, None for all that could come.
    """
    if axis is None or num_shards == 1:
        return _local(x_TD, expert_TA, weight_TA, experts, num_experts)
    num_tokens, num_choices = expert_TA.shape
    order, rank_TA, count_X = _sorted_choices(expert_TA, num_experts)
    room = buffer_rows(num_tokens, num_choices, num_experts, num_shards, buffer)
    count_SPE = lax.all_gather(count_X, axis).reshape(num_shards, num_shards, -1)
    kept_SPE = count_SPE if buffer is None else kept_rows(count_SPE, room, num_tokens)
    route = Route(axis, lax.axis_index(axis), order, rank_TA, expert_TA, count_SPE, kept_SPE, room)
    y_TD = TRANSPORTS[transport](x_TD, weight_TA, experts, route)
    here_SE, kept_SE = count_SPE[:, route.here], kept_SPE[:, route.here]
    return Exchanged(y_TD, here_SE.sum(0), (here_SE - kept_SE).sum())
