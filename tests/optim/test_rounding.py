"""Updates that rounding swallows, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.optim import lost_updates


def test_shares_by_hand():
    params = {"a": jnp.float32([1, 1, 1, 1]), "b": jnp.float32([[4.0, 0.0]]), "c": jnp.float32([2.0])}
    updates = {
        "a": jnp.float32([0, 2**-25, 2**-10, 0.5]),  # none; below float32's half step; below bfloat16's; seen by both
        "b": jnp.float32([[2**-8, 1e-30]]),  # bfloat16 at 4 steps by 2^-5; next to zero every update is seen
        "c": jnp.float32([0]),
    }
    labels = {"a": "muon", "b": "muon", "c": "adamw"}
    assert lost_updates(params, updates, labels) == {"adamw": 0.0, "muon": pytest.approx(1 / 5)}
    assert lost_updates(params, updates, labels, jnp.bfloat16) == {"adamw": 0.0, "muon": pytest.approx(3 / 5)}


def test_bfloat16_weights_stand_still_under_small_updates():
    """Weights of 0.02 and updates of 2e-5, K2's rms of an update at the end: nearly all of a bf16 master is stuck."""
    rng = np.random.default_rng(0)
    params, updates = ({"w": jnp.asarray(rng.normal(0, s, (64, 64)), jnp.float32)} for s in (0.02, 4e-6))
    labels = {"w": "muon"}
    stored = {"w": params["w"].astype(jnp.bfloat16)}
    assert lost_updates(stored, updates, labels)["muon"] > 0.85 > 0.05 > lost_updates(params, updates, labels)["muon"]


def test_a_bfloat16_master_is_counted_as_optax_rounds_it():
    """Its float32 updates are added before anything is rounded: a little more than half a step of 1 is seen."""
    params, updates = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.float32([2**-8 + 2**-20, 2**-8 - 2**-20])}
    assert optax.apply_updates(params, updates)["w"].tolist() == [1 + 2**-7, 1]
    count = lambda p, u: lost_updates(p, u, {"w": "muon"})  # noqa: E731
    assert count(params, updates) == jax.jit(count)(params, updates) == {"muon": 0.5}


def test_labels_of_another_shape_are_an_error():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for labels in ({"a": "muon"}, {"a": "muon", "c": "muon"}, "muon"):
        with pytest.raises(ValueError, match="labels are not shaped alike"):
            lost_updates(params, params, labels)
