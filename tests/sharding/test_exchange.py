"""The expert exchange against a loop over tokens, on 1 to 8 shards."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import KernelsConfig
from k2jax.model.transformer import build_model, declarations, init_router_bias
from k2jax.model.weights import Weight
from k2jax.sharding.exchange import choose_transport, exchange_experts
from k2jax.sharding.place import place

NUM_TOKENS, NUM_CHOICES, NUM_EXPERTS, WIDTH = 24, 3, 8, 5


@jax.custom_vjp
def poison_gradient(x, is_row_W1):
    """x, whose gradient is NaN where it is no row."""
    return x


poison_gradient.defvjp(
    lambda x, is_row_W1: (x, is_row_W1), lambda is_row_W1, dx: (jnp.where(is_row_W1, dx, jnp.nan), None)
)


def linear_experts(w_EIO, row_WI, weight_W, group_sizes_E):
    """Row i times its expert's matrix and its weight, by a mask over all experts: needs neither gather nor scatter.

    Rows past the sum may be given as anything, and so may their gradients: here as NaN, which must reach nothing.
    """
    ends_E = jnp.cumsum(group_sizes_E)
    row = jnp.arange(row_WI.shape[0])[:, None]
    mine_WE = (row < ends_E) & (row >= ends_E - group_sizes_E)
    is_row_W1 = row < ends_E[-1]
    row_WI, weight_W1 = (
        poison_gradient(jnp.where(is_row_W1, x, 0), is_row_W1) for x in (row_WI, weight_W[:, None])
    )
    y_WO = jnp.einsum("WE,WI,EIO->WO", mine_WE.astype(row_WI.dtype), row_WI * weight_W1, w_EIO)
    return jnp.where(is_row_W1, y_WO, jnp.nan)


def exchange(mesh, expert_TA, transport="dense", buffer=None):
    """(x, weights, w) -> (y, loads, dropped) over the expert axis of `mesh`; everything cut over it."""

    def local(x_TD, weight_TA, w_EDD, expert_TA):
        experts = partial(linear_experts, w_EDD)
        num_shards = mesh.shape["expert"]
        out = exchange_experts(
            x_TD, expert_TA, weight_TA, experts, NUM_EXPERTS, "expert", num_shards, transport, buffer
        )
        return out.y_TD, out.load_E, out.dropped[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("expert"),) * 4, out_specs=(P("expert"),) * 3)

    def run(x_TD, weight_TA, w_EDD):
        arrays = [jax.sharding.reshard(jnp.asarray(a), P("expert")) for a in (x_TD, weight_TA, w_EDD, expert_TA)]
        y_TD, *counts = mapped(*arrays)
        return y_TD, counts

    return run


def kept_choices(expert, num_shards, buffer):
    """bool [T, A]: the rule of docs/experts.md in loops; of each shard the highest level that fits its room."""
    room = math.ceil(buffer * (NUM_TOKENS // num_shards) * NUM_CHOICES)
    kept, per_shard = np.zeros(expert.shape, bool), NUM_EXPERTS // num_shards
    sender = np.arange(NUM_TOKENS) * num_shards // NUM_TOKENS
    for shard in range(num_shards):
        groups = [
            np.argwhere((expert == e) & (sender == s)[:, None])
            for e in range(shard * per_shard, (shard + 1) * per_shard)
            for s in range(num_shards)
        ]
        level = max(n for n in range(NUM_TOKENS + 1) if sum(min(len(g), n) for g in groups) <= room)
        for group in groups:
            kept[tuple(group[:level].T)] = True
    return kept


def reference(x, weight, w, expert, dy, kept=None):
    """y, loads, and the gradients of sum(y * dy), token by token and choice by choice."""
    y, load = np.zeros_like(x), np.zeros(NUM_EXPERTS, int)
    dx, dweight, dw = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(w)
    for t, a in np.ndindex(expert.shape):
        e = expert[t, a]
        load[e] += 1
        if kept is not None and not kept[t, a]:
            continue
        y[t] += weight[t, a] * x[t] @ w[e]
        dx[t] += weight[t, a] * w[e] @ dy[t]
        dweight[t, a] = (x[t] @ w[e]) @ dy[t]
        dw[e] += weight[t, a] * np.outer(x[t], dy[t])
    return y, load, (dx, dweight, dw)


def make_inputs():
    rng = np.random.default_rng(0)
    shapes = (NUM_TOKENS, WIDTH), (NUM_TOKENS, NUM_CHOICES), (NUM_EXPERTS, WIDTH, WIDTH), (NUM_TOKENS, WIDTH)
    return [rng.normal(size=shape) for shape in shapes]


def random_choices():
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(NUM_EXPERTS)[:NUM_CHOICES] for _ in range(NUM_TOKENS)]).astype(np.int32)


def same_choices(*experts):
    return np.tile(np.array(experts, np.int32), (NUM_TOKENS, 1))


ROUTINGS = {
    "random": random_choices(),
    "all_to_the_first_experts": same_choices(2, 0, 1),  # on 2 shards all to one: its cells' worst case
    "all_to_the_last_experts": same_choices(6, 7, 5),
}


def check(mesh, expert, transport, buffer, kept):
    """Values, loads, drops and gradients in float64: 1e-12 leaves room for the order of sums alone."""
    x, weight, w, dy = make_inputs()
    y, load, gradients = reference(x, weight, w, expert, dy, kept)
    with jax.enable_x64(True), jax.set_mesh(mesh):

        @jax.jit
        def run(x, weight, w):
            out, pull, counts = jax.vjp(exchange(mesh, expert, transport, buffer), x, weight, w, has_aux=True)
            return out, counts, pull(jax.sharding.reshard(jnp.asarray(dy), P("expert")))

        got_y, (got_load, dropped), got_gradients = jax.device_get(run(x, weight, w))
    assert got_load.tolist() == load.tolist()
    assert dropped.sum() == (0 if kept is None else (~kept).sum())
    for got, want in zip((got_y, *got_gradients), (y, *gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transport", ["dense", "ring"])
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("expert", ROUTINGS.values(), ids=ROUTINGS)
def test_value_loads_and_gradients(mesh_of, num_shards, expert, transport):
    check(mesh_of(expert=num_shards), expert, transport, None, None)


@pytest.mark.parametrize("transport", ["dense", "ring"])
@pytest.mark.parametrize(("num_shards", "buffer"), [(2, 1.25), (4, 1.0), (4, 1.5)])
@pytest.mark.parametrize("routing", ["random", "all_to_the_first_experts"])
def test_bounded_buffer_drops_what_the_rule_says(mesh_of, num_shards, buffer, routing, transport):
    """And nothing else: output, drop count and all gradients are those of the rows that are left, on each transport."""
    kept = kept_choices(ROUTINGS[routing], num_shards, buffer)
    if routing != "random":
        assert not kept.all()
    check(mesh_of(expert=num_shards), ROUTINGS[routing], transport, buffer, kept)


@pytest.mark.parametrize(
    ("platform", "num_shards", "num_choices", "chosen"),
    [
        ("cpu", 4, 8, "dense"),
        ("gpu", 64, 8, "ragged"),
        ("tpu", 8, 8, "ring"),
        ("tpu", 64, 8, "ragged"),
        ("tpu", 8, 4, "ragged"),
        ("tpu", 1, 8, "local"),
    ],
)
def test_auto_goes_by_platform_and_mesh(platform, num_shards, num_choices, chosen):
    assert choose_transport(KernelsConfig(), platform, num_shards, num_choices) == chosen
    named = KernelsConfig(exchange="dense")
    assert choose_transport(named, platform, num_shards, num_choices) == ("local" if num_shards == 1 else "dense")


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# (primitive, times in the forward pass, times forward and backward together): the routing's counts travel once, by
# all_gather, and weights as rows do; a ring sends indices too, and the transpose of a gather is a scattering sum.
MOVES = {
    "dense": [("all_to_all", 3, 6), ("all_gather", 1, 1), ("reduce_scatter", 0, 0)],
    "ring": [("all_to_all", 0, 0), ("all_gather", 5, 6), ("reduce_scatter", 1, 3)],
}


@pytest.mark.parametrize("transport", MOVES)
def test_rows_move_by_their_collective_and_never_by_float_scatter(mesh_of, transport):
    """In the jaxpr of forward and backward; and in the compiled program no float is scattered either."""
    mesh = mesh_of(expert=4)
    x, weight, w, _ = (a.astype(np.float32) for a in make_inputs())
    with jax.set_mesh(mesh):
        run = exchange(mesh, ROUTINGS["random"], transport)
        gradient = jax.grad(lambda *args: jnp.sum(run(*args)[0] ** 2), (0, 1, 2))
        forward, both = (list(equations(jax.make_jaxpr(f)(x, weight, w).jaxpr)) for f in (run, gradient))
        hlo = jax.jit(gradient).lower(x, weight, w).compile().as_text()
    for primitive, in_forward, in_both in MOVES[transport]:
        counted = [[e.primitive.name.startswith(primitive) for e in eqns].count(True) for eqns in (forward, both)]
        assert (primitive, *counted) == (primitive, in_forward, in_both)
    scatters = [e for e in both if e.primitive.name == "scatter" or e.primitive.name.startswith("scatter-")]
    assert scatters  # of indices: otherwise the next line would hold for want of any
    assert not [e for e in scatters if jnp.issubdtype(e.outvars[0].aval.dtype, jnp.floating)]
    assert not [line for line in hlo.splitlines() if re.search(r"= f\d+\S* scatter\(", line)]
    if transport == "dense":
        assert sum("all-to-all(" in line for line in hlo.splitlines()) == 6


def test_model_dispatches_every_token_once(tiny, mesh_of):
    """Experts work on tokens * top_k rows, also where `tensor` cuts the tokens; per expert as on one device."""
    rng, tiny = np.random.default_rng(0), dataclasses.replace(tiny, vocab_size=52)  # `tensor` cuts the head's ids
    weights = declarations(tiny)
    is_weight = lambda w: isinstance(w, Weight)  # noqa: E731
    params = jax.tree.map(lambda w: rng.normal(0, 0.3, w.shape).astype(np.float32), weights, is_leaf=is_weight)
    bias = jax.tree.map(lambda b: rng.normal(0, 0.1, b.shape).astype(np.float32), init_router_bias(tiny))
    tokens = rng.integers(0, tiny.vocab_size, (4, 8), dtype=np.int32)

    @partial(jax.jit, static_argnums=2)
    def run(params, tokens, kernels=KernelsConfig()):
        return build_model(tiny, params, bias, jnp.dtype("float32"), kernels=kernels)(place(tokens, "BT"))

    alone = run(params, tokens)
    with jax.set_mesh(mesh_of(expert=2, tensor=4)):
        spread = run(params, tokens)
    assert np.asarray(spread.report.expert_load).sum(1).tolist() == [4 * 8 * 2] * 2
    np.testing.assert_array_equal(spread.report.expert_load, alone.report.expert_load)
    # three layers of float32 sums, in another order
    np.testing.assert_allclose(spread.logits, alone.logits, rtol=0, atol=2e-6 * np.abs(alone.logits).max())
    with jax.set_mesh(mesh_of(expert=4)):
        kernels = [KernelsConfig(exchange=transport, expert_buffer=1.0) for transport in ("dense", "ring")]
        bounded = [run(params, tokens, choice) for choice in kernels]
    for out in bounded:
        load_LE = np.asarray(out.report.expert_load)
        too_many = np.maximum(load_LE.reshape(2, 4, 2).sum(-1) - 4 * 8 * 2 // 4, 0).sum(1)
        assert load_LE.sum(1).tolist() == [4 * 8 * 2] * 2  # what the router chose, whatever was dropped
        assert (too_many > 0).all() and (out.report.rows_dropped >= too_many).all()
        assert (
            out.report.rows_dropped < too_many + 4 * 8
        ).all()  # the cut is even: less than one row per sender and expert more
    np.testing.assert_array_equal(bounded[0].report.rows_dropped, bounded[1].report.rows_dropped)
    np.testing.assert_allclose(bounded[0].logits, bounded[1].logits, atol=2e-6 * np.abs(alone.logits).max())
    assert np.abs(bounded[0].logits - alone.logits).max() > 1e-3 * np.abs(alone.logits).max()
    assert alone.report.rows_dropped.tolist() == spread.report.rows_dropped.tolist() == [0, 0]
