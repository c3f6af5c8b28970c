"""The one table from dims to mesh axes. Nothing else in k2jax writes a PartitionSpec for an array of the model.

    x_BTD          residual stream: sequences over replica, fsdp and expert; positions over context and tensor
    q_BSHK k_BZHK  inside attention heads take the tensor axis, so queries keep context only and keys none
    w_EDF          experts over expert; at rest every matrix is also cut over fsdp (FSDP_DIMS)

With tokens cut over `tensor` outside attention no token is normalised, routed or dispatched twice.
"""

import jax
from jax.sharding import PartitionSpec as P

from k2jax.sharding.names import DIMS

AXES_OF = {
    "B": ("replica", "fsdp", "expert"),
    "T": ("context", "tensor"),
    "S": ("context",),
    "H": ("tensor",),
    "E": ("expert",),
}
# At rest fsdp cuts the first of these that a matrix has; gains are small and stay whole.
FSDP_DIMS = "DQC"


def spec(dims: str) -> P:
    """PartitionSpec of an array with these dims, in use. Raises ValueError for an unknown dim or a twice used axis."""
    axes = [AXES_OF.get(dim, ()) for dim in dims]
    used = [axis for group in axes for axis in group]
    if unknown := [dim for dim in dims if dim not in DIMS]:
        raise ValueError(f"unknown dims {unknown} in {dims!r}; known: {DIMS}")
    if len(used) != len(set(used)):
        raise ValueError(f"dims {dims!r} use a mesh axis twice: {dict(zip(dims, axes, strict=True))}")
    return P(*(group or None for group in axes))


def stored_spec(dims: str, matrix_dims: str) -> P:
    """PartitionSpec at rest of a weight with `dims`, of which `matrix_dims` make its matrix ("" for a gain)."""
    cut = next((dim for dim in FSDP_DIMS if dim in matrix_dims), None)
    return P(*("fsdp" if dim == cut else axes for dim, axes in zip(dims, spec(dims), strict=True)))


def on_mesh() -> bool:
    """Whether a mesh is set; without one (a model called by hand) arrays keep no shardings."""
    return not jax.sharding.get_abstract_mesh().empty


def place(x: jax.Array, dims: str) -> jax.Array:
    """`x` with its dims laid out as the table says; moves data where the layout changes."""
    return jax.sharding.reshard(x, spec(dims)) if on_mesh() else x


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device: for the few numbers that are reported."""
    return jax.sharding.reshard(x, P()) if on_mesh() else x


def out_spec(dims: str) -> P | None:
    """`spec(dims)` for an `out_sharding` argument; None without a mesh."""
    return spec(dims) if on_mesh() else None
