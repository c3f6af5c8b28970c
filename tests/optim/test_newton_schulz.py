"""Newton-Schulz against float64 NumPy, published scalar values, and inputs at the edge."""

import jax
import numpy as np
import pytest

from k2jax.optim.newton_schulz import newton_schulz

SHAPES = [(5, 12), (12, 5), (8, 8), (1, 6), (3, 4, 7), (2, 3, 9, 4)]


def reference(x, steps=5):
    """The five steps for one matrix (Moonlight 2.1): each singular value becomes what the polynomial makes of it."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def apply_to_stack(function, x):
    return np.stack([function(m) for m in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape)


def worst(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_agrees_with_singular_values(shape):
    """Per matrix of a stack, tall, wide and square; rounding grows with the steps' slope at 0, 3.4445^5 = 485."""
    x = np.random.default_rng(0).normal(size=shape)
    with jax.enable_x64(True):
        assert worst(newton_schulz(jax.numpy.asarray(x), dtype=np.float64), apply_to_stack(reference, x)) < 1e-12


@pytest.mark.parametrize("shape", [(64, 64), (4, 32, 96)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.1)])
def test_error_of_the_working_dtypes(shape, dtype, bound):
    """Of Gaussian matrices, relative in the Frobenius norm; bfloat16 measured at 0.049 (square), 0.073 (wide)."""
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = apply_to_stack(reference, x.astype(np.float64))
    result = newton_schulz(x, dtype=jax.numpy.dtype(dtype))
    assert result.dtype == np.float32
    assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(
    ("x", "y"), [(1e-3, 0.470544), (0.01, 0.698917), (0.1, 0.712120), (0.3, 1.079592), (0.5, 0.765439), (1.0, 0.696436)]
)
def test_published_scalar_values(x, y):
    """k2-facts 4.2. A diagonal matrix of norm 1 keeps its entries apart, so each is the scalar's polynomial."""
    matrix = np.diag([x, np.sqrt(1 - x * x)])
    with jax.enable_x64(True):
        result = newton_schulz(jax.numpy.asarray(matrix), dtype=np.float64)
    assert float(result[0, 0]) == pytest.approx(y, abs=5e-7)  # the digits given


def test_band_of_singular_values():
    """k2-facts 4.2: between 0.68183 and 1.13436 wherever the input is above 1 % of the norm; both ends are reached."""
    inputs = np.linspace(0.01, 0.99, 2000)
    matrices = np.zeros((len(inputs), 2, 2))
    matrices[:, 0, 0], matrices[:, 1, 1] = inputs, np.sqrt(1 - inputs**2)
    with jax.enable_x64(True):
        outputs = np.asarray(newton_schulz(jax.numpy.asarray(matrices), dtype=np.float64))[:, 0, 0]
    assert (outputs.min(), outputs.max()) == pytest.approx((0.68183, 1.13436), abs=1e-4)  # a grid finds them to 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_stays_zero(dtype):
    x = np.zeros((2, 4, 6), np.float32)
    x[1, 0, 0] = 1  # beside a matrix that is not
    result = np.asarray(newton_schulz(x, dtype=jax.numpy.dtype(dtype)))
    assert (result[0] == 0).all()
    assert result[1, 0, 0] == pytest.approx(0.696436, rel=1e-6 if dtype == "float32" else 0.02)


def test_rank_one():
    """The one singular value is f^5(1); nothing grows beside it but rounding, times 485."""
    rng = np.random.default_rng(2)
    u, v = rng.normal(size=6), rng.normal(size=9)
    expected = 0.696436 * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v)
    assert worst(newton_schulz(np.outer(u, v).astype(np.float32), dtype=np.float32), expected) < 485 * 2**-23


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30, 3e37])
def test_scale_does_not_matter(scale):
    """Squares of these over- or underflow in float32; the result is that of the same matrix at scale 1."""
    x = np.random.default_rng(3).uniform(-1, 1, (6, 9)).astype(np.float32)
    scaled = x * np.float32(scale)
    assert worst(newton_schulz(scaled, dtype=np.float32), reference(x.astype(np.float64))) < 5e-6
