"""Bad steps are skipped, to the bit, and counted; good ones go on as if the bad batch had never been."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import make_config, make_values

from k2jax.config import GuardConfig, MeshConfig
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import spec
from k2jax.train.guard import Guard, after_step, init_guard, is_good, skip_reasons, zscores
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state, init_state
from k2jax.train.step import make_train_step

CONFIG = GuardConfig(window=4, loss_zscore=3.0, grad_norm_zscore=2.0)
CALM = np.float32([1.0, 1.2, 0.8, 1.0])  # mean 1, standard deviation 0.1414


def good_by(config, guard, loss, grad_norm, max_logits):
    """`is_good` by the scores of the guard."""
    return is_good(config, zscores(guard, loss, grad_norm), loss, grad_norm, max_logits)


def guard(losses=CALM, log_norms=CALM):
    return Guard(jnp.int32(0), jnp.int32(0), jnp.asarray(losses), jnp.asarray(log_norms))


@pytest.mark.parametrize(
    ("values", "good"),
    [
        ({}, True),
        ({"loss": np.nan}, False),
        ({"loss": np.inf}, False),
        ({"grad_norm": np.inf}, False),
        ({"max_logit": np.inf}, False),
        ({"max_logit": np.nan}, False),
        ({"loss": 1 + 2.9 * 0.1414}, True),
        ({"loss": 1 + 3.1 * 0.1414}, False),
        ({"loss": -100.0}, True),  # a spike goes up
        ({"grad_norm": np.exp(1 + 1.9 * 0.1414)}, True),
        ({"grad_norm": np.exp(1 + 2.1 * 0.1414)}, False),
        ({"grad_norm": 0.0}, True),
    ],
    ids=str,
)
def test_what_is_bad(values, good):
    values = {"loss": 1.0, "grad_norm": np.e, "max_logit": 5.0} | values
    logits = jnp.array([[1.0, values["max_logit"]]])
    assert bool(good_by(CONFIG, guard(), jnp.float32(values["loss"]), jnp.float32(values["grad_norm"]), logits)) == good


def test_a_skipped_step_gives_its_reasons():
    scores = np.asarray(zscores(guard(), jnp.float32(1 + 3.5 * 0.141421), jnp.float32(np.exp(1 + 1.5 * 0.141421))))
    np.testing.assert_allclose(scores, [3.5, 1.5], rtol=1e-3)
    assert skip_reasons(CONFIG, 1.495, 3.4, 5.0, scores) == ["loss = 1.495 has z-score 3.50 > guard.loss_zscore = 3"]
    assert skip_reasons(CONFIG, np.nan, np.inf, 5.0, (np.nan, np.inf)) == [
        "loss = nan is not finite", "grad_norm = inf is not finite",
        "grad_norm = inf has z-score inf > guard.grad_norm_zscore = 2",
    ]  # fmt: skip
    assert np.isnan(zscores(guard(np.r_[np.nan, CALM[1:]]), jnp.float32(9.0), jnp.float32(1.0))[0])


@pytest.mark.parametrize("bound", [0.7, 2.9, 8.1])
def test_a_spike_always_has_its_reason(bound):
    """Losses within three roundings of the bound: what decides is what is reported, to the last bit."""
    config = dataclasses.replace(CONFIG, loss_zscore=bound)
    past = np.random.default_rng(0).normal(3, 0.3, (4000, 4)).astype(np.float32)
    losses = (past.mean(1) + np.float32(bound) * past.std(1)).astype(np.float32)
    losses = np.concatenate([losses + k * np.spacing(losses) for k in range(-3, 4)])
    past, calm = np.tile(past, (7, 1)), jnp.float32(1)

    def look(past, loss):
        scores = zscores(guard(past), loss, calm)
        return is_good(config, scores, loss, calm, jnp.ones((1, 1))), scores

    good, scores = map(np.asarray, jax.jit(jax.vmap(look))(past, losses))
    assert 0.2 < good.mean() < 0.8
    skipped = zip(losses[~good], scores[~good].tolist(), strict=True)
    assert all(len(skip_reasons(config, loss, 1.0, 1.0, score)) == 1 for loss, score in skipped)


def test_no_spike_is_seen_without_a_score_or_a_full_window():
    calm, logits = (jnp.float32(50.0), jnp.float32(1e9)), jnp.ones((1, 1))
    off = dataclasses.replace(CONFIG, loss_zscore=None, grad_norm_zscore=None)
    assert good_by(off, guard(), *calm, logits) and not good_by(CONFIG, guard(), *calm, logits)
    young = guard(np.r_[np.nan, CALM[1:]], np.r_[np.nan, CALM[1:]])
    assert good_by(CONFIG, young, *calm, logits)


def test_what_is_remembered():
    seen = init_guard(CONFIG)
    for loss, good in ((3.0, True), (9.0, False), (9.0, False), (2.0, True), (np.nan, False)):
        seen = after_step(seen, jnp.bool_(good), jnp.float32(loss), jnp.float32(np.exp(loss)))
    np.testing.assert_array_equal(seen.losses, [np.nan, np.nan, 3, 2])
    np.testing.assert_allclose(seen.log_norms, [np.nan, np.nan, 3, 2], rtol=1e-6)
    assert (seen.skipped, seen.in_a_row) == (3, 1)


@functools.cache
def compiled(model):
    """(mesh, a state on it, compiled step, good batch) with a window of two steps; one compile for all tests."""
    config = dataclasses.replace(make_config(model, 1), guard=GuardConfig(window=2, loss_zscore=3.0))
    config = config.replace({"optim.warmup_tokens": 100 * config.batch_tokens})  # no two steps have the same rate
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, mesh)
        state = init_state(config, tx)
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec("MBT"))), make_values(config)[2])
        step = jax.jit(make_train_step(config, tx)).lower(state, batch).compile()
        layout = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), step(state, batch)[0],
                              abstract_state(config, tx, mesh))  # fmt: skip
    assert all(jax.tree.leaves(layout))
    return mesh, state, step, batch


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def parts(state):
    return state.params, state.opt_state, state.router_bias


def with_guard(state, **values):
    values = {k: jax.device_put(np.asarray(v), getattr(state.guard, k).sharding) for k, v in values.items()}
    return dataclasses.replace(state, guard=state.guard._replace(**values))


@pytest.mark.parametrize("kind", ["spike", "not_a_number"])
def test_a_bad_step_changes_nothing_but_the_counters(tiny, kind):
    mesh, state, step, batch = compiled(tiny)
    with jax.set_mesh(mesh):
        state, _ = step(state, batch)  # so that momentum and counters are not zero
        bad = with_guard(state, losses=np.float32([1.0, 1.001]))
        if kind == "not_a_number":
            # one weight so large that logits and loss overflow
            head = np.array(bad.params["head"])
            head[0, 0] = 3e38
            head = jax.device_put(head, bad.params["head"].sharding)
            bad = dataclasses.replace(bad, params=bad.params | {"head": head})
        after, metrics = step(bad, batch)
        same(parts(after), parts(bad))
        same(after.guard._replace(skipped=0, in_a_row=0), bad.guard._replace(skipped=0, in_a_row=0))
        assert (int(after.step), int(after.guard.skipped), int(after.guard.in_a_row)) == (2, 1, 1)
        assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (1, 1)
        assert np.isfinite(metrics.loss) == (kind == "spike")


def test_training_goes_on_as_if_the_batch_had_never_been(tiny):
    """The next step is the same to the bit with or without a bad one before it, and its learning rate too."""
    mesh, state, step, batch = compiled(tiny)
    with jax.set_mesh(mesh):
        first, _ = step(state, batch)
        want, want_metrics = step(first, batch)
        bad, _ = step(with_guard(first, losses=np.float32([1.0, 1.001])), batch)
        got, metrics = step(with_guard(bad, losses=first.guard.losses), batch)
    same(parts(got), parts(want))
    assert metrics.learning_rate == want_metrics.learning_rate and int(metrics.skipped_in_a_row) == 0
    assert (int(got.step), int(got.guard.skipped), int(want.step)) == (3, 1, 2)
    assert not np.array_equal(jax.device_get(got.params["head"]), jax.device_get(first.params["head"]))
