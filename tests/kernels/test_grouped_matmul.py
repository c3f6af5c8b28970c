"""Values and both gradients against a loop over rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import KernelsConfig
from k2jax.kernels import grouped_matmul as module
from k2jax.kernels.grouped_matmul import choose_grouped_matmul, grouped_matmul

NUM_ROWS, NUM_GROUPS, NUM_IN, NUM_OUT = 37, 6, 5, 7


def zipf(rng):
    return rng.multinomial(NUM_ROWS, (1 / np.arange(1, 7)) / (1 / np.arange(1, 7)).sum())


SIZES = {
    "random": np.random.default_rng(0).multinomial(NUM_ROWS, np.full(6, 1 / 6)),
    "zipf": zipf(np.random.default_rng(1)),
    "empty_groups": [0, 10, 0, 0, 27, 0],
    "all_in_one": [0, 0, 0, NUM_ROWS, 0, 0],
    "all_in_last": [0, 0, 0, 0, 0, NUM_ROWS],
    "rows_past_the_sum": [3, 0, 8, 5, 1, 4],
    "borders_on_blocks": [8, 8, 0, 16, 0, 5],
    "nothing": [0, 0, 0, 0, 0, 0],
}


def reference(x, w, sizes, dy):
    """y, dx, dw of sum(y * dy), row by row."""
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ w[group]
        dx[row] = w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@partial(jax.jit, static_argnums=(4, 5))
def value_and_gradients(x, w, sizes, dy, block, implementation="blocked"):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, (w,), sizes, implementation, block), x, w)
    return y, *pull(dy)


def rows_alone(results, sizes):
    """y, dx and dw up to the sum of the sizes: the rest of y and dx may be anything."""
    y, dx, *dw = results
    return y[: sum(sizes)], dx[: sum(sizes)], *dw


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (NUM_ROWS, NUM_IN), (NUM_GROUPS, NUM_IN, NUM_OUT), (NUM_ROWS, NUM_OUT)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("block", [1, 8, 16, 40, 256])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_float64_agrees_with_loop(sizes, block):
    """1e-13: only the order of sums differs."""
    x, w, dy = inputs()
    expected = reference(x, w, sizes, dy)
    with jax.enable_x64(True):
        results = value_and_gradients(x, w, np.array(sizes, np.int32), dy, block)
        for result, want in zip(rows_alone(results, sizes), rows_alone(expected, sizes), strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ragged_dot_agrees_with_loop(sizes):
    x, w, dy = inputs()
    with jax.enable_x64(True):
        results = value_and_gradients(x, w, np.array(sizes, np.int32), dy, 8, "ragged_dot")
        for result, want in zip(*(rows_alone(r, sizes) for r in (results, reference(x, w, sizes, dy))), strict=True):
            np.testing.assert_allclose(result, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", ["blocked", "ragged_dot"])
def test_several_weights_at_once_are_as_one_by_one(implementation):
    """Of different widths, so that a swap or a wrong border is an error."""
    (x, left, dy), sizes = inputs(), np.array(SIZES["random"], np.int32)
    right = np.random.default_rng(5).normal(size=(NUM_GROUPS, NUM_IN, 3))
    dy_right = np.random.default_rng(6).normal(size=(NUM_ROWS, 3))
    one, other = reference(x, left, sizes, dy), reference(x, right, sizes, dy_right)
    with jax.enable_x64(True):
        run = lambda x, *w: grouped_matmul(x, w, sizes, implementation, 8)  # noqa: E731
        y, pull = jax.vjp(run, *map(jnp.asarray, (x, left, right)))
        gradients = pull(jnp.concatenate([dy, dy_right], 1))
        expected = np.concatenate([one[0], other[0]], 1), one[1] + other[1], one[2], other[2]
        for got, want in zip((y, *gradients), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_bfloat16_sums_weight_gradients_in_float32():
    """2,001 times 3/8 is 750.375, in bfloat16 752. Summed in bfloat16, blocks of 3 are rounded from 256 on."""
    x, w, dy = (jnp.full(shape, v, jnp.bfloat16) for shape, v in (((2001, 1), 0.375), ((1, 1, 1), 1), ((2001, 1), 1)))
    _, _, dw = value_and_gradients(x, w, np.array([2001], np.int32), dy, 8)
    assert dw.dtype == jnp.bfloat16
    assert float(dw[0, 0, 0]) == 752


@pytest.mark.parametrize("implementation", ["blocked", "ragged_dot"])
def test_rows_past_the_sum_may_hold_anything(implementation):
    """The exchange leaves empty slots there: what they hold must not reach another row, not even as 0 * inf."""
    x, w, dy = (v.astype(np.float32) for v in inputs())
    sizes = np.array(SIZES["rows_past_the_sum"], np.int32)
    past = np.arange(NUM_ROWS)[:, None] >= sizes.sum()
    clean = value_and_gradients(x, w, sizes, dy, 8, implementation)
    x, dy = np.where(past, np.float32(np.inf), x), np.where(past, np.float32(np.inf), dy)
    dirty = value_and_gradients(x, w, sizes, dy, 8, implementation)
    for result, want in zip(*(rows_alone(jax.device_get(r), sizes) for r in (dirty, clean)), strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize(
    ("platform", "problem", "chosen"),
    [("cpu", None, "blocked"), ("tpu", None, "ragged_dot"), ("gpu", None, "tokamax"), ("gpu", "broken", "blocked")],
)
def test_auto_is_never_dense(platform, problem, chosen, monkeypatch):
    """`lax.ragged_dot` is on CPUs and GPUs; tokamax may be missing, or not work with this jax."""
    monkeypatch.setattr(module, "tokamax_problem", lambda: problem)
    assert choose_grouped_matmul(KernelsConfig(), platform) == chosen
    assert choose_grouped_matmul(KernelsConfig(grouped_matmul="ragged_dot"), platform) == "ragged_dot"
