"""Orthogonalise matrices by Newton-Schulz iterations, plain or on the Gram matrix (Muon; Moonlight 2.1)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Quintic = tuple[float, float, float]
# Polar Express (arXiv 2505.16932, table of the authors' code), every step but the last pulled in by 1 % as there, so
# that rounding cannot push a singular value out of the interval that the next step is made for.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The steps of each published set; a longer iteration repeats the last one.
COEFFICIENTS: dict[str, tuple[Quintic, ...]] = {
    "standard": ((3.4445, -4.7750, 2.0315),),  # Keller Jordan's; Moonlight and K2
    "dion": (  # microsoft/dion, as optax has it too
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS[:-1]), _POLAR_EXPRESS[-1]),
    "newton": ((1.875, -1.25, 0.375),),  # the classical quintic: slow, but it converges to 1
}
GRAM_PARTS = (3, 2)  # steps before the Gram form looks at the matrix itself again; later parts are like the last
GRAM_ASPECT = 1.5  # of a matrix from which on 8 n^2 m + 28 n^3 FLOPs are fewer than the plain 20 n^2 m + 10 n^3


def coefficients_of(coefficients: str | Sequence[Quintic], steps: int) -> list[Quintic]:
    """The (a, b, c) of each step. Raises ValueError for a name that is not in COEFFICIENTS, or for no steps."""
    if isinstance(coefficients, str) and coefficients not in COEFFICIENTS:
        known = ", ".join(map(repr, COEFFICIENTS))
        raise ValueError(f"coefficients = {coefficients!r}: must be one of {known}, or a list of (a, b, c)")
    table = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else tuple(coefficients)
    if steps < 1 or not table or any(np.shape(quintic) != (3,) for quintic in table):
        raise ValueError(f"{steps = }, {coefficients = }: must be at least one step and one triple (a, b, c)")
    return [table[min(step, len(table) - 1)] for step in range(steps)]


def _normalise(x: jax.Array) -> jax.Array:
    """x / ||x||_F per matrix, by way of its largest entry so that no square over- or underflows. Zero stays zero."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    # 1 / x is subnormal, and flushed to zero, for the largest numbers there are: XLA may divide by multiplying with it.
    step = jnp.where(largest > 1, 2.0**-32, 1.0).astype(x.dtype)
    x = (x * step) / jnp.where(largest > 0, largest * step, 1)
    norm = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def _plain(y: jax.Array, quintics: list[Quintic], multiply) -> jax.Array:
    """Y <- (a + b R + c R^2) Y with R = Y Y^T."""
    for a, b, c in quintics:
        gram = multiply(y, y.mT)
        # Or XLA keeps what each step began with, to add up all of the a * y at the end: five matrices, not two.
        y = jax.lax.optimization_barrier(a * y + multiply(b * gram + c * multiply(gram, gram), y))
    return y


def _gram(y: jax.Array, quintics: list[Quintic], multiply) -> jax.Array:
    """The same on n x n matrices: with P = a + b R + c R^2, R becomes P R P; the P's are gathered before Y is touched.

    R holds squares of singular values, so small ones would drown in its rounding; a restart from Y brings them back.
    """
    # Two steps by hand: Y2 = P2 P1 Y0, and with P1 a polynomial in R0 = Y0 Y0^T, R1 = Y1 Y1^T = P1 R0 P1. So only the
    # first and the last product of a part have the long side m; all others are n x n.
    sizes, rest = list(GRAM_PARTS), list(quintics)
    while rest:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        part, rest = rest[:size], rest[size:]
        gram, gathered = multiply(y, y.mT), None
        for left, (a, b, c) in zip(range(len(part) - 1, -1, -1), part, strict=True):
            p = a * jnp.eye(y.shape[-2], dtype=y.dtype) + b * gram + c * multiply(gram, gram)
            gathered = p if gathered is None else multiply(p, gathered)
            gram = multiply(multiply(p, gram), p) if left else None
        y = multiply(gathered, y)
    return y


def newton_schulz_flops(n: int, m: int, steps: int) -> int:
    """FLOPs of the plain form on one matrix n x m: per step two products of n x n with n x m, and one of n x n."""
    n, m = sorted((n, m))
    return steps * (4 * n * n * m + 2 * n**3)


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    dtype: jnp.dtype = jnp.bfloat16,
    coefficients: str | Sequence[Quintic] = "standard",
    form: Literal["auto", "plain", "gram"] = "auto",
) -> jax.Array:
    """Nearly orthogonal factor of every matrix in x [..., n, m]; same shape and dtype as x.

    With the standard coefficients singular values end in [0.68, 1.14] for inputs above 1 % of the norm. The steps blow
    up what is smaller, rounding included (485 times by the standard set), so in bfloat16 the directions that a matrix
    of low rank lacks come out as noise, as with every bfloat16 Newton-Schulz; in float32 they stay small. Normalises in
    float32 (or wider), iterates in `dtype` on the shorter side; leading dims are never merged, so that a stack stays
    cut over a mesh as it was. coefficients: a name of COEFFICIENTS, or (a, b, c) per step, the last repeated. form:
    "gram" does the same steps with fewer FLOPs on long matrices; "auto" takes it from GRAM_ASPECT on where `dtype` is
    at least float32, since in bfloat16 it is less accurate.
    Raises ValueError for unknown coefficients or form, and for x without two dims or not of floats.
    """
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x has shape {x.shape}, must have at least two dims")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"newton_schulz: x has dtype {x.dtype}, must be of floats")
    if form not in ("auto", "plain", "gram"):
        raise ValueError(f"newton_schulz: {form = }: must be 'auto', 'plain' or 'gram'")
    quintics = coefficients_of(coefficients, steps)
    tall = x.shape[-2] > x.shape[-1]
    # Accelerators would otherwise multiply float32 matrices as bf16.
    multiply = partial(jnp.matmul, precision=None if dtype == jnp.bfloat16 else "highest")
    y = _normalise(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(dtype)
    y = y.mT if tall else y
    worth = y.shape[-1] >= GRAM_ASPECT * y.shape[-2] and jnp.finfo(dtype).bits >= 32
    y = (_gram if form == "gram" or (form == "auto" and worth) else _plain)(y, quintics, multiply)
    return (y.mT if tall else y).astype(x.dtype)
