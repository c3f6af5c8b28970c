"""Transports of rows between the shards of the expert axis: three ways to the same rows in the same order.

    T tokens here, A experts per token, P shards, E experts of one shard, S shards as senders, M = T * A choices here,
    R rows that one shard has room for, W = P * cell slots of the dense transport, N = S * T tokens of all shards

At its owner a row stands by expert, then by sender, then by token: sorted for the experts, so nothing moves again. Its
weight travels with it and acts there, so that a token's rows are only added up when they are back: their gradient is
the token's, and that of a weight needs no row that has to come back once more.

Rows past those that came hold anything, NaN too: neither the experts' weights nor a sum ever reads them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from k2jax.sharding.permute import inverse, sum_rows, take_rows

Experts = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
LANES = 128  # of a TPU's tiles: the narrowest row that its ragged collective takes


class Route(NamedTuple):
    """The routing table: alike on all shards but for this shard's own tokens."""

    axis: str
    here: jax.Array  # this shard's index
    order_M: jax.Array  # choices t * A + a sorted by expert, then token
    rank_TA: jax.Array  # place of each choice among this shard's choices of the same expert
    expert_TA: jax.Array
    count_SPE: jax.Array  # rows that shard s has for expert e of shard p
    kept_SPE: jax.Array  # how many of them are sent: the first of each
    room: int

    @property
    def group_sizes_E(self) -> jax.Array:
        return self.kept_SPE[:, self.here].sum(0)

    @property
    def first_row_SPE(self) -> jax.Array:
        """First row at shard p of those that shard s has for its expert e."""
        kept_PES = self.kept_SPE.transpose(1, 2, 0)
        flat = kept_PES.reshape(kept_PES.shape[0], -1)
        return (jnp.cumsum(flat, 1) - flat).reshape(kept_PES.shape).transpose(2, 0, 1)


def _own_choices(route: Route, first_PE: jax.Array, none: int) -> jax.Array:
    """[T, A]: first[shard, expert] + rank for each choice that is kept, `none` for the others."""
    kept_X, first_X = route.kept_SPE[route.here].reshape(-1), first_PE.reshape(-1)
    place_TA = first_X[route.expert_TA] + route.rank_TA
    return jnp.where(route.rank_TA < kept_X[route.expert_TA], place_TA, none)


class Slices(NamedTuple):
    """Arguments of `lax.ragged_all_to_all`, one slice per (other shard, expert), and the way back of the same rows."""

    start: jax.Array  # [P * E] where each slice begins in what is sent
    size: jax.Array
    place: jax.Array  # where it begins at its receiver
    received: jax.Array  # [P * E] sizes of the slices that come in

    def back(self, first: jax.Array, place: jax.Array) -> "Slices":
        return Slices(first, self.received, place, self.size)


def ragged_slices(route: Route) -> tuple[Slices, Slices]:
    """Slices of the way out, from choices sorted by expert to rows at their owners, and of the way back."""
    count_SX = route.count_SPE.reshape(route.count_SPE.shape[0], -1)
    start_SPE = (jnp.cumsum(count_SX, 1) - count_SX).reshape(route.count_SPE.shape)
    first_SPE, here = route.first_row_SPE, route.here
    out = Slices(*(a[here].reshape(-1) for a in (start_SPE, route.kept_SPE, first_SPE)), _column(route.kept_SPE, here))
    return out, out.back(_column(first_SPE, here), _column(start_SPE, here))


def _column(table_SPE, here):
    """Counts that all senders have for shard `here`, sender by sender."""
    return table_SPE[:, here].reshape(-1)


def unwritten(x: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows, D] in the dtype of x, of whatever its memory holds: a fill would be one more pass over it.

    Seemingly made of x: JAX would take out of a scan over layers what depends on nothing there, and then has to copy it
    in every layer. A function with a batching rule of its own is one operation to JAX and none to the compiler.
    """
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))  # the mesh axes over which x varies

    @jax.custom_batching.sequential_vmap
    def make(x):
        return lax.pcast(lax.empty((num_rows, *x.shape[1:]), x.dtype), axes, to="varying")

    return make(x)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged_move(x, way: Slices, back: Slices, axis: str, num_rows: int):
    """x's slices at their receivers, [num_rows, D], anything where none came; the gradient travels back."""
    buffer = unwritten(x, num_rows)
    return lax.ragged_all_to_all(x, buffer, way.start, way.size, way.place, way.received, axis_name=axis)


def _ragged_forward(x, way, back, axis, num_rows):
    return _ragged_move(x, way, back, axis, num_rows), (way, back, jnp.zeros((x.shape[0], 0)))


def _ragged_backward(axis, num_rows, saved, dy):
    way, back, like_x = saved
    return _ragged_move(dy, back, way, axis, like_x.shape[0]), None, None


_ragged_move.defvjp(_ragged_forward, _ragged_backward)


def choice_weights(weight_TA: jax.Array, choice_W: jax.Array, place_TA: jax.Array) -> jax.Array:
    """[W]: the weight of the choice t * A + a that stands at each place, any where none does."""
    return take_rows(weight_TA.reshape(-1), choice_W, place_TA.reshape(-1, 1))


def ragged(x_TD: jax.Array, weight_TA: jax.Array, experts: Experts, route: Route) -> jax.Array:
    """Each row travels once per choice and nothing else does. TPU and GPU: XLA has no such collective on a CPU."""
    out, back = ragged_slices(route)
    token_M = route.order_M // weight_TA.shape[1]
    place_TA = _own_choices(route, out.start.reshape(route.kept_SPE.shape[1:]), token_M.size)
    sent_MD = take_rows(x_TD, token_M, place_TA)
    weight_ML = jnp.pad(choice_weights(weight_TA, route.order_M, place_TA)[:, None], ((0, 0), (0, LANES - 1)))
    rows_RD, weight_RL = (_ragged_move(sent, out, back, route.axis, route.room) for sent in (sent_MD, weight_ML))
    y_RD = experts(rows_RD, weight_RL[:, 0], route.group_sizes_E)
    returned_MD = _ragged_move(y_RD, back, out, route.axis, token_M.size)
    return sum_rows(returned_MD, place_TA, token_M)


def _swap(x: jax.Array, axis: str, num_shards: int) -> jax.Array:
    """All-to-all of the leading dim, seen as [P, ...]: cell p goes to shard p."""
    cells = x.reshape(num_shards, -1, *x.shape[1:])
    return lax.all_to_all(cells, axis, split_axis=0, concat_axis=0).reshape(x.shape)


def dense(x_TD: jax.Array, weight_TA: jax.Array, experts: Experts, route: Route) -> jax.Array:
    """All-to-all of equal cells, each with room for the most that one shard may send another: runs everywhere."""
    num_shards, _, per_shard = route.kept_SPE.shape
    num_tokens, num_choices = weight_TA.shape
    cell = min(num_tokens * min(num_choices, per_shard), route.room)
    num_slots = num_shards * cell
    before_SPE = jnp.cumsum(route.kept_SPE, 2) - route.kept_SPE  # within a cell rows stand by expert, then token
    first_PE = before_SPE[route.here] + jnp.arange(num_shards)[:, None] * cell
    slot_TA = _own_choices(route, first_PE, num_slots)
    choice_W = inverse(slot_TA.reshape(-1), num_slots, slot_TA.size)
    token_W = choice_W // num_choices  # T * A // A = T: none
    sent = take_rows(x_TD, token_W, slot_TA), choice_weights(weight_TA, choice_W, slot_TA)
    received_WD, weight_W = (_swap(rows, route.axis, num_shards) for rows in sent)

    # Where the slots of each sender's cell go among the rows sorted by expert.
    kept_SE, before_SE = route.kept_SPE[:, route.here], before_SPE[:, route.here]
    slot = jnp.arange(cell)
    expert_SC = jnp.minimum(jnp.sum(slot[:, None] >= (before_SE + kept_SE)[:, None, :], -1), per_shard - 1)
    shift_SC = jnp.take_along_axis(route.first_row_SPE[:, route.here] - before_SE, expert_SC, 1)
    filled_SC = slot < kept_SE.sum(1)[:, None]
    row_W = jnp.where(filled_SC, shift_SC + slot, route.room).reshape(-1)
    slot_R = inverse(row_W, route.room, num_slots)
    rows_RD, weight_R = (take_rows(received, slot_R, row_W[:, None]) for received in (received_WD, weight_W))
    y_RD = experts(rows_RD, weight_R, route.group_sizes_E)
    returned_WD = _swap(take_rows(y_RD, row_W, slot_R[:, None]), route.axis, num_shards)
    return sum_rows(returned_WD, slot_TA, token_W)


def ring(x_TD: jax.Array, weight_TA: jax.Array, experts: Experts, route: Route) -> jax.Array:
    """Every shard sees all tokens, works on those of its own experts, and the outputs are summed on the way back.

    The sum over the shards is in the dtype of x, where the other transports sum a token's experts in float32.
    """
    axis, num_shards = route.axis, route.kept_SPE.shape[0]
    num_choices = weight_TA.shape[1]
    gather = partial(lax.all_gather, axis_name=axis, tiled=True)
    first_S = jnp.repeat(jnp.arange(num_shards), weight_TA.shape[0])[:, None]  # the sender of each gathered token
    expert_NA, rank_NA = gather(route.expert_TA), gather(route.rank_TA)
    kept_SX, first_SX = (t.reshape(num_shards, -1) for t in (route.kept_SPE, route.first_row_SPE))
    owner_NA = expert_NA // route.kept_SPE.shape[2]
    taken_NA = (owner_NA == route.here) & (rank_NA < kept_SX[first_S, expert_NA])
    row_NA = jnp.where(taken_NA, first_SX[first_S, expert_NA] + rank_NA, route.room)
    choice_R = inverse(row_NA.reshape(-1), route.room, row_NA.size)
    token_R = choice_R // num_choices
    weight_R = choice_weights(gather(weight_TA), choice_R, row_NA)
    y_RD = experts(take_rows(gather(x_TD), token_R, row_NA), weight_R, route.group_sizes_E)
    return lax.psum_scatter(sum_rows(y_RD, row_NA, token_R), axis, scatter_dimension=0, tiled=True)
