"""Stages of a run: from the right step on, without another compile; the balance loss reaches the router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import LENGTH, NUM_ROWS, make_config, make_values

from k2jax.config import PhasesConfig
from k2jax.model.rope import make_rope
from k2jax.sharding.mesh import single_device_mesh
from k2jax.sharding.rules import spec
from k2jax.train.optimizer import make_optimizer
from k2jax.train.phases import phase_of, rope_after
from k2jax.train.state import abstract_state
from k2jax.train.step import accumulate, make_loss, make_train_step

TOKENS = NUM_ROWS * LENGTH  # of one step


def staged(tiny, **columns):
    return dataclasses.replace(make_config(tiny, 1), phases=PhasesConfig(**columns))


def test_stage_begins_at_the_first_step_past_its_tokens(tiny):
    config = staged(
        tiny,
        start_tokens=(0, 2 * TOKENS, 2 * TOKENS + 1, 15_500_000_000_000),
        rope=("plain",) * 3 + ("yarn",),
        router_bias_rate=(0.1,) * 4,
        balance_alpha=(0.0,) * 4,
    ).validate()
    assert [phase_of(config, step) for step in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 2]
    traced = jax.jit(lambda step: phase_of(config, step))
    assert [int(traced(step)) for step in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 2]
    assert rope_after(config, 0) == rope_after(config, 5) == "plain"


def steps(config, tokens_of_first, count):
    """States and metrics of `count` steps, in one program."""
    params, bias, batch = make_values(config)
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, mesh)
        abstract = abstract_state(config, tx, mesh)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
        first = np.int32(tokens_of_first // TOKENS)
        state = dataclasses.replace(zeros, step=first, params=params, router_bias=bias)
        state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, abstract)
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec("MBT"))), batch)
        step = jax.jit(make_train_step(config, tx)).lower(state, batch).compile()
        found = []
        for _ in range(count):
            state, metrics = step(state, batch)
            found.append(jax.device_get((state, metrics)))
    return found


def test_each_stage_has_its_own_values(tiny):
    """One program from stage to stage: the bias moves by the stage's rate, and YaRN is there from its step on."""
    config = staged(
        tiny,
        start_tokens=(0, TOKENS, 2 * TOKENS),
        rope=("plain", "yarn", "yarn"),
        router_bias_rate=(0.01, 0.02, 0.0),
        balance_alpha=(0.0, 0.0, 0.0),
    ).validate()
    found = steps(config, 0, 3)
    biases = [make_values(config)[1], *(state.router_bias for state, _ in found)]
    moved = [np.abs(b["moe"]["ffn"]["bias"] - a["moe"]["ffn"]["bias"]).max() for a, b in zip(biases, biases[1:])]
    # by the rate or, where the signs have a mean, by up to twice as much
    assert 0.0099 < moved[0] < 0.0195 < moved[1] < 0.039 and moved[2] == 0
    low, high = found[0][1].router_bias
    assert (low, high) == (found[0][0].router_bias["moe"]["ffn"]["bias"].min(), biases[1]["moe"]["ffn"]["bias"].max())
    loss = jax.jit(make_loss(config))
    _, _, batch = make_values(config)
    microbatch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    before = (make_values(config)[0], found[0][0].params)
    for (_, metrics), params, bias, kind, other in zip(
        found, before, biases, ("plain", "yarn"), ("yarn", "plain"), strict=False
    ):
        of = lambda k, p=params, b=bias: float(loss(p, b, microbatch, make_rope(tiny, k)).loss) / TOKENS  # noqa: E731
        assert float(metrics.loss) == pytest.approx(of(kind), rel=1e-6)
        assert abs(float(metrics.loss) - of(other)) > 1e-4


def test_balance_loss_reaches_the_router_with_its_weight(tiny):
    """Its gradient is alpha times its own, is not zero at the router, and does not count microbatches twice."""
    gradients = {}
    for alpha, count in ((0.0, 1), (0.5, 1), (0.5, 4)):
        config = make_config(tiny, count)
        params, bias, batch = make_values(config)
        loss_fn = make_loss(config)
        with jax.set_mesh(single_device_mesh()):
            losses, grads = jax.jit(
                lambda p, b, x, f=loss_fn, a=alpha: accumulate(
                    lambda *args: f(*args, rope=make_rope(tiny, "plain")), jnp.float32(a), p, b, x
                )
            )(params, bias, jax.tree.map(jnp.asarray, batch))
        gradients[alpha, count] = jax.device_get(grads)["moe"]["ffn"]["router"], float(losses.report.balance_loss[0])

    def direct(router):
        config = make_config(tiny, 1)
        params, bias, batch = jax.tree.map(jnp.asarray, make_values(config))
        params["moe"]["ffn"]["router"] = router
        one = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
        return make_loss(config)(params, bias, one, make_rope(tiny, "plain")).report.balance_loss.sum()

    own = jax.jit(jax.grad(direct))(make_values(make_config(tiny, 1))[0]["moe"]["ffn"]["router"])
    assert np.abs(own).max() > 1e-4
    without, once, four = (gradients[k][0] for k in ((0.0, 1), (0.5, 1), (0.5, 4)))
    np.testing.assert_allclose(once - without, 0.5 * own, atol=2e-6 * np.abs(once).max())
    np.testing.assert_allclose(four, once, atol=2e-6 * np.abs(once).max())
    assert gradients[0.5, 4][1] == pytest.approx(gradients[0.5, 1][1], rel=1e-6)
