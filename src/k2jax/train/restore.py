"""Reading a checkpoint back: each process the parts of its own devices, one array after the other, and proves them.

By TensorStore, without Orbax, which reads all arrays at once, each part beside all others, up to three times the state
in host memory, or with a limit waits for ever for a part that is larger; and which all processes must call together.
"""

from pathlib import Path

import jax
import numpy as np
import tensorstore

from k2jax.errors import RunFailed, first_of
from k2jax.runs.commits import arrays_of, read_record
from k2jax.runs.mirror import mirror_of, shown
from k2jax.storage import PATIENT, Folder, shared_context
from k2jax.train.content import content_problems, name_of


def open_array(arrays: Path, name: str) -> tensorstore.TensorStore:
    """One array of a step, such as "model.params.moe.ffn.gate", to be read in parts. No cache is kept.

    arrays: the folder of the step's arrays, written by Orbax or by train/bucket_arrays.py; in a mirror, of the bucket.
    """
    item, _, rest = name.partition(".")
    mirror = mirror_of(arrays)
    place = Folder(arrays / item) if mirror is None else mirror.folder(arrays / item)
    spec = {"driver": "zarr3"}
    if place.has("manifest.ocdbt"):
        spec["kvstore"] = {"driver": "ocdbt", "base": place.spec(), "path": f"{rest}/"}
    else:  # a lost chunk is no chunk of zeros
        spec |= {"kvstore": place.spec(rest), "fill_missing_data_reads": False}
    return tensorstore.open(spec | {"context": PATIENT}, open=True, read=True, context=shared_context()).result()


def _read(stored: tensorstore.TensorStore, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The array with the layout of `wanted`. Devices with the same part share one reading of it."""
    shape, sharding = wanted.shape, wanted.sharding
    bounds = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    reads = {part: stored[tuple(slice(*ends) for ends in part)].read() for part in dict.fromkeys(bounds.values())}
    parts = [jax.device_put(np.asarray(reads[part].result()), device) for device, part in bounds.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, parts))


def restore_items(folder: Path, step: int, items: dict) -> dict:
    """The items of `step`, {"model": ..., "optimizer": ...} or some of them, laid out as their ShapeDtypeStructs say.

    On any mesh and number of processes. Host memory: the arrays and one of them again. Raises UserError if the commit
    record was changed, RunFailed with every array that cannot be read, or whose shape, dtype or content is another.
    """
    record = read_record(folder, step)
    root, expected = arrays_of(folder, record), record["content"]
    paths, tree = jax.tree_util.tree_flatten_with_path(items)
    arrays, problems = [], []
    for path, wanted in paths:
        name = name_of(path)
        try:
            stored = open_array(root, name)
            found, due = (stored.shape, stored.dtype.numpy_dtype), (wanted.shape, np.dtype(wanted.dtype))
            if found != due:
                problems.append(f"{name}: is {found[1]} {list(found[0])}, must be {due[1]} {list(due[0])}")
                continue
            arrays.append(_read(stored, wanted))
        except ValueError as error:  # TensorStore's
            problems.append(f"{name}: {str(error).splitlines()[0]}")
    if not problems:
        items = tree.unflatten(arrays)
        problems = content_problems(items, expected)
    if problems:  # in files that are sound: what read them, or what they passed through, is not
        where = f"{shown(root)}: cannot be restored: {'; '.join(first_of(problems, 3))}"
        raise RunFailed(f"{where}; start again, on another machine if it repeats")
    return items


def damaged_arrays(folder: Path, step: int) -> list[str]:
    """Every array of a step that cannot be read, or whose content is not what was saved, with its places.

    Reads the whole step, one array in memory at a time. Raises UserError if the commit record was changed.
    """
    problems, record = [], read_record(folder, step)
    root = arrays_of(folder, record)
    for name, digests in record["content"].items():
        try:
            value = jax.numpy.asarray(open_array(root, name).read().result())
        except ValueError as error:
            problems.append(f"{name}: cannot be read: {str(error).splitlines()[0]}")
            continue
        problems += content_problems({name: value}, {name: digests})
    return problems
