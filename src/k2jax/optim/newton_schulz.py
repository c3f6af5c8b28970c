"""Orthogonalise matrices by the quintic Newton-Schulz iteration (Muon; k2-facts 4.2, Moonlight 2.1)."""

from functools import partial

import jax
import jax.numpy as jnp

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's, used by Moonlight and K2


def _normalise(x: jax.Array) -> jax.Array:
    """x / ||x||_F per matrix, by way of its largest entry so that no square over- or underflows. Zero stays zero."""
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def newton_schulz(
    x: jax.Array, steps: int = 5, dtype: jnp.dtype = jnp.bfloat16, coefficients=COEFFICIENTS
) -> jax.Array:
    """Nearly orthogonal factor of every matrix in x [..., n, m]; same shape and dtype as x.

    X <- a X + (b A + c A^2) X with A = X X^T, on the shorter side. Singular values end in [0.68, 1.14] for
    inputs above 1 % of the norm. Normalises in x's dtype, iterates in `dtype`; leading dims are never merged,
    so that a stack stays cut over a mesh as it was.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    # Accelerators would otherwise multiply float32 matrices as bf16.
    multiply = partial(jnp.matmul, precision=None if dtype == jnp.bfloat16 else "highest")
    y = _normalise(x).astype(dtype)
    y = y.mT if tall else y
    for _ in range(steps):
        gram = multiply(y, y.mT)
        y = a * y + multiply(b * gram + c * multiply(gram, gram), y)
    return (y.mT if tall else y).astype(x.dtype)
