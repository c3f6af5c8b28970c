"""The model of a checkpoint, one array after the other, each device's part read by itself: bounded in host memory.

Orbax reads all arrays at once and each part beside all others, at up to three times the model's size; and all processes
have to call it together.
"""

from pathlib import Path

import jax
import numpy as np

from k2jax.errors import RunFailed
from k2jax.runs.commits import read_record
from k2jax.train.checkpoint import open_array
from k2jax.train.content import content_problems


def _read(folder: Path, step: int, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The array `name` of the model, such as "params.moe.ffn.gate", with the shape, dtype and layout of `wanted`."""
    where = f"{folder / str(step)}: {name}"
    try:
        stored = open_array(folder, step, "model", name)
        found, expected = (stored.shape, stored.dtype.numpy_dtype), (wanted.shape, np.dtype(wanted.dtype))
        if found != expected:
            raise RunFailed(f"{where}: is {found[1]} {list(found[0])}, must be {expected[1]} {list(expected[0])}")
        parts = [
            jax.block_until_ready(jax.device_put(np.asarray(stored[index].read().result()), device))
            for device, index in wanted.sharding.addressable_devices_indices_map(wanted.shape).items()
        ]
        return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)
    except ValueError as error:  # TensorStore's, for what it cannot read
        raise RunFailed(f"{where}: {error}") from None


def read_model(folder: Path, step: int, abstract: dict) -> dict:
    """{"params", "router_bias"} of `step`, laid out as `abstract`, the same of ShapeDtypeStructs, says.

    Raises RunFailed if an array cannot be read or its content is not what was saved, UserError if the commit record was
    changed.
    """
    expected = read_record(folder, step)["content"]
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract)
    arrays = []
    for path, wanted in paths:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        array = _read(folder, step, name, wanted)
        # As a tree with the path of the record, so that each array's check is done before the next one is read.
        if problems := content_problems({"model": {name: array}}, expected):
            raise RunFailed(f"{folder / str(step)}: read back with another content: {'; '.join(problems)}")
        arrays.append(array)
    return tree.unflatten(arrays)
