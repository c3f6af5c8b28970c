"""Weights that devices share inside `jax.shard_map`: said before use, so that autodiff adds up their gradients."""

import math
from functools import partial

import jax
from jax.sharding import PartitionSpec as P

from k2jax.dtypes import wide
from k2jax.sharding.names import LAYER_AXES
from k2jax.sharding.rules import in_use_axes, spec


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def replicated(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`w`, equal on all devices along the mesh `axes`. Their gradients are added up in at least float32.

    A sum in bf16 loses 2 % over 256 devices and a third over 1,024: benchmarks/gradient_rounding.py.
    """
    return jax.lax.pcast(w, axes, to="varying")


def _forward(w, axes):
    return replicated(w, axes), None


def _backward(axes, _, dw):
    return (jax.lax.psum(dw.astype(wide(dw.dtype)), axes).astype(dw.dtype),)


replicated.defvjp(_forward, _backward)


def on_mesh() -> bool:
    """True if arrays have shardings here: a mesh is set (a model may be called without), outside of `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def num_shards(dim: str) -> int:
    """Parts that an array's dim of this letter is cut into, in use, on the mesh that is set; 1 without one."""
    shape = jax.sharding.get_abstract_mesh().shape if on_mesh() else {}
    return math.prod(shape.get(axis, 1) for axes in in_use_axes(dim) for axis in axes)


def num_stages() -> int:
    """Pipeline stages of the mesh that is set; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("stage", 1)


def platform() -> str:
    """"cpu", "gpu" or "tpu": of the mesh that is set (which need not be of this machine), else of JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def place(x: jax.Array, dims: str) -> jax.Array:
    """`x` with its dims laid out as the table says; moves data where the layout changes."""
    return jax.sharding.reshard(x, spec(dims)) if on_mesh() else x


def uncut_axes(dims: str, axes: tuple[str, ...] = LAYER_AXES) -> tuple[str, ...]:
    """Those of the mesh `axes` along which arrays with these dims are the same, in use."""
    cut = {axis for group in in_use_axes(dims) for axis in group}
    return tuple(axis for axis in axes if axis not in cut)


def varying(tree, dims: str, axes: tuple[str, ...] = LAYER_AXES):
    """Mark local parts of arrays [dims] inside `jax.shard_map` as varying along the axes that do not cut them.

    Before use, so that autodiff sums their gradients over the devices that share them.
    """
    return jax.lax.pcast(tree, uncut_axes(dims, axes), to="varying")


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device: for the few numbers that are reported."""
    return jax.sharding.reshard(x, P()) if on_mesh() else x


def out_spec(dims: str) -> P | None:
    """`spec(dims)` for an `out_sharding` argument; None without a mesh."""
    return spec(dims) if on_mesh() else None
