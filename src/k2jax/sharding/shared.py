"""Weights that devices share inside `jax.shard_map`: said before use, so that autodiff adds up their gradients."""

from functools import partial

import jax

from k2jax.dtypes import wide


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`w`, equal on all devices along the mesh `axes`. Their gradients are added up in at least float32.

    A sum in bf16 loses 2 % over 256 devices and a third over 1,024: benchmarks/gradient_rounding.py.
    """
    return jax.lax.pcast(w, axes, to="varying")


def _forward(w, axes):
    return shared(w, axes), None


def _backward(axes, _, dw):
    return (jax.lax.psum(dw.astype(wide(dw.dtype)), axes).astype(dw.dtype),)


shared.defvjp(_forward, _backward)
