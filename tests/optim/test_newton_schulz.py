"""Newton-Schulz against float64 NumPy, published scalar values, and inputs at the edge."""

import jax
import numpy as np
import pytest

from k2jax.optim.newton_schulz import COEFFICIENTS, coefficients_of, newton_schulz

SHAPES = [(5, 12), (12, 5), (8, 8), (1, 6), (3, 4, 7), (2, 3, 9, 4)]


def reference(x, quintics=((3.4445, -4.7750, 2.0315),) * 5):
    """The five steps for one matrix (Moonlight 2.1): each singular value becomes what the polynomial makes of it."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s)
    for a, b, c in quintics:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def apply_to_stack(function, x):
    return np.stack([function(m) for m in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape)


def worst(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_float64_agrees_with_singular_values(shape, form):
    """Per matrix of a stack, tall, wide and square; rounding grows with the steps' slope at 0, 3.4445^5 = 485."""
    x = np.random.default_rng(0).normal(size=shape)
    with jax.enable_x64(True):
        result = newton_schulz(jax.numpy.asarray(x), dtype=np.float64, form=form)
    assert worst(result, apply_to_stack(reference, x)) < 1e-12


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_every_published_set(name, steps, form):
    """Each step its own triple, the last one repeated; both forms make the same polynomial of the singular values."""
    x = np.random.default_rng(0).normal(size=(4, 24))
    quintics = coefficients_of(name, steps)
    assert len(quintics) == steps and quintics[-1] == COEFFICIENTS[name][min(steps, len(COEFFICIENTS[name])) - 1]
    with jax.enable_x64(True):
        result = newton_schulz(jax.numpy.asarray(x), steps, np.float64, name, form)
    assert worst(result, reference(x, quintics)) < 1e-10


def test_polar_express_is_closer_to_orthogonal():
    """After as many steps its singular values are nearer to 1 than those of the standard set."""
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    far = [
        np.abs(np.linalg.svd(newton_schulz(x, 5, np.float32, name), compute_uv=False) - 1).max()
        for name in ("polar_express", "standard")
    ]
    assert far[0] < 0.15 < 0.25 < far[1]


def test_last_polar_express_step_is_not_pulled_in():
    """The authors' code leaves the last step out of the 1 %; it is the classical quintic, whose fixed point is 1."""
    assert COEFFICIENTS["polar_express"][-1] == COEFFICIENTS["newton"][-1] == (1.875, -1.25, 0.375)
    assert COEFFICIENTS["polar_express"][0] == pytest.approx((8.2051604, -22.9019350, 16.4607249), abs=1e-6)


def test_wrong_coefficients_are_refused():
    with pytest.raises(ValueError, match="must be one of 'standard', 'dion', 'polar_express', 'newton'"):
        newton_schulz(np.ones((2, 2), np.float32), coefficients="kimi")
    with pytest.raises(ValueError, match="at least one step"):
        newton_schulz(np.ones((2, 2), np.float32), 0)
    with pytest.raises(ValueError, match="one triple"):  # a triple is no list of triples
        newton_schulz(np.ones((2, 2), np.float32), coefficients=(3.4445, -4.7750, 2.0315))
    with pytest.raises(ValueError, match="at least two dims"):
        newton_schulz(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="int32, must be of floats"):
        newton_schulz(np.ones((2, 2), np.int32))
    with pytest.raises(ValueError, match="'Gram': must be 'auto', 'plain' or 'gram'"):
        newton_schulz(np.ones((2, 2), np.float32), form="Gram")


def moonlights_own(x, steps=5):
    """Moonlight's code in bf16, operation by operation (k2-facts 4.2: transposed when tall, 1e-7 added to the norm)."""
    y = jax.numpy.asarray(x, jax.numpy.bfloat16)
    y = y.T if y.shape[0] > y.shape[1] else y
    y = y / (jax.numpy.linalg.norm(y.astype(np.float32)).astype(y.dtype) + 1e-7)
    for _ in range(steps):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return np.asarray(y.T if x.shape[0] > x.shape[1] else y, np.float64)


def test_bf16_is_no_worse_than_moonlights():
    """Against float64, relative in the Frobenius norm; Gaussian, and with rows whose sizes span six decades.

    Single inputs differ by luck, up to 1.7 either way; over all of them ours is the smaller. The Gram form in bf16 is
    up to twice as far off where singular values spread, so "auto" takes the plain one there.
    """
    errors = []
    for shape in [(64, 64), (64, 256), (256, 64), (256, 896)]:
        for scale in (np.ones(shape[0]), np.logspace(0, -6, shape[0])):
            for seed in range(3):
                x = (np.random.default_rng(seed).normal(size=shape) * scale[:, None]).astype(np.float32)
                exact = reference(x.astype(np.float64))
                both = (newton_schulz(x), moonlights_own(x))
                errors.append([np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact) for y in both])
    ours, theirs = np.array(errors).T
    assert (ours < 1.8 * theirs).all() and 0.02 < theirs.min() and ours.max() < 0.13
    assert ours.mean() < 1.02 * theirs.mean(), (ours.mean(), theirs.mean())


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize(("rank", "bound"), [(64, 1e-5), (12, 5e-4), (1, 5e-4)])
def test_float32_of_every_rank(form, rank, bound):
    """Rounding of the directions that are not there grows by 485; the bounds are the issue's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, rank)) @ rng.normal(size=(rank, 224)) if rank < 64 else rng.normal(size=(64, 224))
    x = x.astype(np.float32)
    result = newton_schulz(x, dtype=np.float32, form=form)
    exact = reference(x.astype(np.float64))
    assert np.linalg.norm(result - exact) / np.linalg.norm(exact) < bound


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


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30, 3e37, 3e38])
def test_scale_does_not_matter(scale):
    """Squares of these over- or underflow in float32; the result is that of the same matrix at scale 1."""
    x = np.random.default_rng(3).uniform(-1, 1, (6, 9)).astype(np.float32)
    scaled = x * np.float32(scale)
    assert worst(newton_schulz(scaled, dtype=np.float32), reference(x.astype(np.float64))) < 5e-6
