"""The mesh that a trained model is used on: the training's layouts, without pipeline stages."""

import contextlib
import dataclasses
import math

import jax

from k2jax.config import Config, MeshConfig, ModelConfig
from k2jax.errors import UserError
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import AXES_OF

DATA_AXES = AXES_OF["B"]  # prompts, and rows that are scored, are cut over these
SCORING_AXES = (*DATA_AXES, "tensor", "context")
DECODING_AXES = (*DATA_AXES, "tensor")
_HINTS = {
    "stage": "pipeline stages are for training alone; give mesh.expert or mesh.fsdp more",
    "context": "new tokens are too few to cut; give mesh.tensor more, which cuts the cache of past tokens as well",
}


def inference_mesh(
    sizes: MeshConfig, model: ModelConfig, axes: tuple[str, ...] = DECODING_AXES
) -> jax.sharding.Mesh:
    """The mesh of these sizes over all devices. axes: those that may be above 1.

    Raises UserError with every axis that may not, every size of the model that an axis does not divide, and a product
    that is not the number of devices.
    """
    found = {axis: size for axis, size in dataclasses.asdict(sizes).items() if size > 1 and axis not in axes}
    problems = [f"mesh.{axis} = {size}: must be 1 here: {_HINTS[axis]}" for axis, size in found.items()]
    checked = Config(model=model, mesh=dataclasses.replace(sizes, **dict.fromkeys(found, 1)))
    problems += [problem for problem in checked.problems() if problem.startswith(("model.", "mesh."))]
    if any(size < 1 for size in dataclasses.asdict(sizes).values()):
        raise UserError(*problems)
    try:
        mesh = make_mesh(sizes)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    return mesh


def on(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which `mesh` is set; None: no mesh, arrays are on one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def padded_to(mesh: jax.sharding.Mesh | None, axes: tuple[str, ...], count: int) -> int:
    """The smallest multiple of the product of the mesh `axes` that is at least `count`; `count` without a mesh."""
    divisor = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    return -(-count // divisor) * divisor
