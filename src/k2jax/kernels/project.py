"""Activation times weight, with gradients written so that XLA's CPU matmul takes them without a transpose.

`jnp.einsum`'s own gradient for the weight is a matmul in the other operand order and a transpose after it; a SwiGLU
layer's forward and backward took twice as long with it on a CPU (benchmarks/project.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from k2jax.dtypes import wide


def _spec(x: jax.Array) -> P | None:
    """The explicit sharding of x, None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def _project(equation, x, w, out_spec, dtype, precision):
    return jnp.einsum(equation, x, w, out_sharding=out_spec, preferred_element_type=dtype, precision=precision)


def _forward(equation, x, w, out_spec, dtype, precision):
    return _project(equation, x, w, out_spec, dtype, precision), (x, w)


def _backward(equation, out_spec, dtype, precision, saved, dy):
    x, w = saved
    operands, y_dims = equation.split("->")
    x_dims, w_dims = operands.split(",")
    dx = jnp.einsum(f"{y_dims},{w_dims}->{x_dims}", dy, w, out_sharding=_spec(x), precision=precision)
    # Devices that share w add up their parts in float32: bf16 loses more the more of them there are (docs/memory.md).
    dw = jnp.einsum(
        f"{x_dims},{y_dims}->{w_dims}", x, dy, out_sharding=_spec(w), precision=precision,
        preferred_element_type=wide(dy.dtype),
    )  # fmt: skip
    return dx.astype(x.dtype), dw.astype(w.dtype)


_project.defvjp(_forward, _backward)


def project(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    out_spec: P | None = None,
    dtype: jnp.dtype | None = None,
    precision: str | None = None,
) -> jax.Array:
    """jnp.einsum(equation, x, w), and its gradients in the dtypes of x and w.

    out_spec: sharding of the result where a cut dim is summed; dtype: of the result; precision: of the matmuls.
    """
    return _project(equation, x, w, out_spec, dtype, precision)
