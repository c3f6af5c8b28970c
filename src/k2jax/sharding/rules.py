"""The one table from dims to mesh axes. Nothing else in k2jax writes a PartitionSpec for an array of the model.

    x_BTD          residual stream: sequences over replica, fsdp and expert; positions over context and tensor
    q_BSHK k_BZHK  inside attention heads take the tensor axis, so queries keep context only and keys none
    w_EDF          experts over expert; at rest every matrix is cut over all axes but replica (stored_spec)
    x_YBTD         embedding, head and loss take the microbatches stage by stage; model/pipeline.py has the layers

With tokens cut over `tensor` outside attention no token is normalised, routed or dispatched twice.
"""

import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from k2jax.sharding.names import DIMS

AXES_OF = {
    "Y": ("stage",),
    "B": ("replica", "fsdp", "expert"),
    "T": ("context", "tensor"),
    "S": ("context",),
    "H": ("tensor",),
    "E": ("expert",),
    "V": ("tensor",),
}
# At rest fsdp cuts the first of these that a matrix has; gains are small and stay whole.
FSDP_DIMS = "DQC"
# Cut at rest as well, so that no two devices of a replica hold, update or orthogonalise the same part. Replicas do:
# what they would save on that is less than gathering it again over the slow network between them costs.
SPARE_AXES = ("stage", "expert", "tensor", "context")


def in_use_axes(dims: str) -> list[tuple[str, ...]]:
    """The mesh axes that cut each of these dims in use. Raises ValueError for an unknown dim or a twice used axis."""
    axes = [AXES_OF.get(dim, ()) for dim in dims]
    used = [axis for group in axes for axis in group]
    if unknown := [dim for dim in dims if dim not in DIMS]:
        raise ValueError(f"unknown dims {unknown} in {dims!r}; known: {DIMS}")
    if len(used) != len(set(used)):
        raise ValueError(f"dims {dims!r} use a mesh axis twice: {dict(zip(dims, axes, strict=True))}")
    return axes


def spec(dims: str) -> P:
    """PartitionSpec of an array with these dims, in use. Raises ValueError as `in_use_axes` does."""
    return P(*(axes or None for axes in in_use_axes(dims)))


def stored_spec(dims: str, matrix_dims: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """PartitionSpec at rest, on a mesh with axes of these sizes, of a weight [dims] of this shape.

    `matrix_dims` make its matrix; "" for a gain, which stays whole. Cuts in use stay; stages cut the layers where their
    number allows it, so that each has its own; fsdp comes next, then every axis of SPARE_AXES that is left cuts the
    first dim of the matrix whose local size it divides, together with the axes that are there already. Where no dim
    divides, the weight is copied along that axis.
    """
    cuts = {dim: list(axes) for dim, axes in zip(dims, in_use_axes(dims), strict=True)}
    if "L" in dims and sizes["stage"] > 1 and shape[dims.index("L")] % sizes["stage"] == 0:
        cuts["L"].append("stage")
    if matrix_dims:
        cuts[next(dim for dim in FSDP_DIMS if dim in matrix_dims)].append("fsdp")
    used = {axis for axes in cuts.values() for axis in axes}
    for axis in (axis for axis in SPARE_AXES if sizes[axis] > 1 and axis not in used):
        for dim, size in zip(dims, shape, strict=True):
            if dim in matrix_dims and size % math.prod(sizes[a] for a in (*cuts[dim], axis)) == 0:
                cuts[dim].append(axis)
                break
    return P(*(tuple(axes) or None for axes in cuts.values()))
