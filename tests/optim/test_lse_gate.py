"""With the gate the clip is the one of the true maxima, and the pass for them runs only where it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.optim import clip_factors, lse_gate

TAU = 100.0


def logits(scale, seed, shape=(3, 4, 32)):
    """[layers, H, keys] of one query, the largest `scale`, many close below: log-sum-exps are 2 to 3 higher."""
    x = np.random.default_rng(seed).exponential(2.0, size=shape)
    return (scale + x.min() - x).astype(np.float32)


def look(x, dtype):
    """(largest logits, their log-sum-exp in `dtype`) of [layers, H, keys]."""
    return jnp.max(x, -1), jax.nn.logsumexp(x, axis=-1).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 96.0, 97.5, 99.7, 99.999, 100.001, 100.2, 400.0])
def test_factors_are_those_of_the_true_maxima(scale, dtype):
    for seed in range(20):
        largest, lse = look(logits(scale, seed), dtype)
        seen, is_exact = jax.jit(lambda lse, largest: lse_gate(lse, TAU, lambda: largest))(lse, largest)
        np.testing.assert_array_equal(clip_factors(seen, TAU), clip_factors(largest, TAU))
        assert seen.dtype == jnp.float32 and bool(is_exact) == (not bool((np.asarray(seen) != largest).any()))
        assert is_exact or scale < 100


@pytest.mark.parametrize(("scale", "calls"), [(50.0, 0), (99.99, 1), (130.0, 1)])
def test_the_exact_pass_runs_only_when_it_must(scale, calls):
    """Under jit and inside a scan over layers; an LSE is at most ln(32) = 3.5 over the maximum."""
    largest, lse = look(logits(scale, 0), "float32")
    ran = []

    def layer(_, row):
        def exact():
            jax.debug.callback(lambda: ran.append(1))
            return row[0]

        return None, lse_gate(row[1], TAU, exact)

    _, (seen, is_exact) = jax.jit(lambda a, b: jax.lax.scan(layer, None, (a, b)))(largest, lse)
    jax.effects_barrier()
    assert len(ran) == int(is_exact.sum()) and is_exact.any() == bool(calls)
    np.testing.assert_array_equal(clip_factors(seen, TAU), clip_factors(largest, TAU))


def test_a_rounded_lse_hides_no_clip():
    """The one logit of a head is 100.2, its LSE too; rounded to bfloat16 that is 100, which is not over tau."""
    largest = jnp.float32([[100.2]])
    lse = largest.astype(jnp.bfloat16)
    assert float(lse[0, 0]) == TAU
    seen, is_exact = lse_gate(lse, TAU, lambda: largest)
    assert is_exact and seen == largest


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_looked_at(value):
    seen, is_exact = lse_gate(jnp.float32([[1.0, value]]), TAU, lambda: jnp.float32([[0.5, 7.0]]))
    assert is_exact and seen.tolist() == [[0.5, 7.0]]
