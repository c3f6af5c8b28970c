"""The expert exchange against a loop over tokens, on 1 to 8 shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.model.transformer import build_model, declarations, init_router_bias
from k2jax.model.weights import Weight
from k2jax.sharding.exchange import exchange_experts
from k2jax.sharding.rules import place

NUM_TOKENS, NUM_CHOICES, NUM_EXPERTS, WIDTH = 24, 3, 8, 5


def linear_experts(w_EIO, row_WI, group_sizes_E):
    """Row i times its expert's matrix, by a mask over all experts: needs neither gather nor scatter."""
    ends_E = jnp.cumsum(group_sizes_E)
    row = jnp.arange(row_WI.shape[0])[:, None]
    mine_WE = (row < ends_E) & (row >= ends_E - group_sizes_E)
    return jnp.einsum("WE,WI,EIO->WO", mine_WE.astype(row_WI.dtype), row_WI, w_EIO)


def exchange(mesh, expert_TA):
    """(x, weights, w) -> (y, loads) over the expert axis of `mesh`; everything cut over it."""

    def local(x_TD, weight_TA, w_EDD, expert_TA):
        experts = partial(linear_experts, w_EDD)
        return exchange_experts(x_TD, expert_TA, weight_TA, experts, NUM_EXPERTS, "expert", mesh.shape["expert"])

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("expert"),) * 4, out_specs=(P("expert"), P("expert")))

    def run(x_TD, weight_TA, w_EDD):
        arrays = [jax.sharding.reshard(a, P("expert")) for a in (x_TD, weight_TA, w_EDD, expert_TA)]
        return mapped(*arrays)

    return run


def reference(x, weight, w, expert, dy):
    """y, loads, and the gradients of sum(y * dy), token by token and choice by choice."""
    y, load = np.zeros_like(x), np.zeros(NUM_EXPERTS, int)
    dx, dweight, dw = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(w)
    for t, a in np.ndindex(expert.shape):
        e = expert[t, a]
        load[e] += 1
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


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("expert", ROUTINGS.values(), ids=ROUTINGS)
def test_value_loads_and_gradients(mesh_of, num_shards, expert):
    """In float64, where 1e-12 leaves room for the order of sums alone: a dropped or doubled row cannot hide."""
    x, weight, w, dy = make_inputs()
    y, load, gradients = reference(x, weight, w, expert, dy)
    mesh = mesh_of(expert=num_shards)
    with jax.enable_x64(True), jax.set_mesh(mesh):

        @jax.jit
        def run(x, weight, w):
            out, pull, loads = jax.vjp(exchange(mesh, expert), x, weight, w, has_aux=True)
            return out, loads, pull(jax.sharding.reshard(jnp.asarray(dy), P("expert")))

        result = jax.device_get(run(x, weight, w))
    assert result[1].tolist() == load.tolist()
    np.testing.assert_allclose(result[0], y, rtol=1e-12, atol=1e-12)
    for got, want in zip(result[2], gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_rows_move_by_all_to_all_and_never_by_float_scatter(mesh_of):
    """Forward: rows out, counts out, rows back; backward: rows out and back. XLA keeps them all as all-to-alls."""
    mesh = mesh_of(expert=4)
    x, weight, w, _ = (a.astype(np.float32) for a in make_inputs())
    with jax.set_mesh(mesh):
        run = exchange(mesh, ROUTINGS["random"])
        gradient = jax.grad(lambda *args: jnp.sum(run(*args)[0] ** 2), (0, 1, 2))
        forward, both = (list(equations(jax.make_jaxpr(f)(x, weight, w).jaxpr)) for f in (run, gradient))
        hlo = jax.jit(gradient).lower(x, weight, w).compile().as_text()
    assert [e.primitive.name for e in forward].count("all_to_all") == 3
    assert [e.primitive.name for e in both].count("all_to_all") == 5
    scatters = [e for e in both if e.primitive.name.startswith("scatter")]
    assert scatters  # of indices: otherwise the next line would hold for want of any
    assert not [e for e in scatters if jnp.issubdtype(e.outvars[0].aval.dtype, jnp.floating)]
    assert sum("all-to-all(" in line for line in hlo.splitlines()) == 5


def test_model_dispatches_every_token_once(tiny, mesh_of):
    """Experts work on tokens * top_k rows, also where `tensor` cuts the tokens; per expert as on one device."""
    rng = np.random.default_rng(0)
    weights = declarations(tiny)
    is_weight = lambda w: isinstance(w, Weight)  # noqa: E731
    params = jax.tree.map(lambda w: rng.normal(0, 0.3, w.shape).astype(np.float32), weights, is_leaf=is_weight)
    bias = jax.tree.map(lambda b: rng.normal(0, 0.1, b.shape).astype(np.float32), init_router_bias(tiny))
    tokens = rng.integers(0, tiny.vocab_size, (4, 8), dtype=np.int32)

    @jax.jit
    def run(params, tokens):
        return build_model(tiny, params, bias, jnp.dtype("float32"))(place(tokens, "BT"))

    alone = run(params, tokens)
    with jax.set_mesh(mesh_of(expert=2, tensor=4)):
        spread = run(params, tokens)
    assert np.asarray(spread.expert_load).sum(1).tolist() == [4 * 8 * 2] * 2
    np.testing.assert_array_equal(spread.expert_load, alone.expert_load)
    # three layers of float32 sums, in another order
    np.testing.assert_allclose(spread.logits, alone.logits, rtol=0, atol=2e-6 * np.abs(alone.logits).max())
