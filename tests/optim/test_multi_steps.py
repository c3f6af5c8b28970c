"""QK-Clip under optax.MultiSteps clips by the largest logits of all calls of a step, as one call with the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.optim import QKPart, multi_steps, qk_clip

PARAMS = {"q": jnp.linspace(-1, 1, 6 * 2 * 4).reshape(6, 2, 4)}
PARTS = {"q": QKPart(0, ((4, 1.0),))}
LOGITS = [jnp.array([[300.0, 5.0]]), jnp.array([[20.0, 10.0]]), jnp.array([[50.0, 250.0]])]  # of three calls


def chain() -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(0.1), qk_clip(100.0, PARTS))


def grads(seed: int) -> dict:
    return {"q": jax.random.normal(jax.random.key(seed), PARAMS["q"].shape)}


def accumulated(tx, logits, first: int, params, state):
    for number, values in enumerate(logits):
        updates, state = jax.jit(tx.update)(grads(first + number), state, params, max_logits=values)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_two_steps_are_those_of_whole_batches(order):
    """The second step has small logits: what the first saw is forgotten."""
    tx = multi_steps(optax.MultiSteps(chain(), 3), 1, 2)
    found, state = accumulated(tx, [LOGITS[i] for i in order], 0, PARAMS, tx.init(PARAMS))
    whole, expected, inner = chain(), PARAMS, chain().init(PARAMS)
    for first, largest in ((0, jnp.array([[300.0, 250.0]])), (3, jnp.array([[20.0, 10.0]]))):
        mean = jax.tree.map(lambda *x: sum(x) / 3, *(grads(first + i) for i in range(3)))
        updates, inner = whole.update(mean, inner, expected, max_logits=largest)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(found["q"], expected["q"], rtol=1e-5, atol=1e-6)
        if first == 0:
            found, state = accumulated(tx, [LOGITS[1]] * 3, 3, found, state)


def test_a_call_that_is_left_out_does_not_count():
    tx = multi_steps(optax.MultiSteps(chain(), 2, should_skip_update_fn=optax.skip_not_finite), 1, 2)
    state = tx.init(PARAMS)
    bad = {"q": jnp.full_like(PARAMS["q"], jnp.nan)}
    _, state = tx.update(bad, state, PARAMS, max_logits=LOGITS[0])
    assert not jnp.isfinite(state.max_logits).any()
    _, state = tx.update(grads(0), state, PARAMS, max_logits=LOGITS[1])
    np.testing.assert_array_equal(state.max_logits, LOGITS[1])


def test_logits_that_are_missing_are_asked_for():
    tx = multi_steps(optax.MultiSteps(chain(), 2), 1, 2)
    with pytest.raises(ValueError, match=r"needs max_logits \[1, 2\] of the call; got none"):
        tx.update(grads(0), tx.init(PARAMS), PARAMS)
