"""Arrays of a checkpoint in a bucket: zarr3 in objects of its own, each of a chunk's bytes as they are in memory.

Each process writes the chunks of which its devices hold the first copy, and no chunk spans two devices, so nothing is
written twice, merged or renamed. The sha256 of an object is that of the memory it was written from. Orbax cannot do
this without further libraries for each kind of bucket, and merges what processes wrote by reading it again.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from k2jax.processes import is_first
from k2jax.storage import Folder
from k2jax.train.content import name_of

_WRITES = 8  # chunks that are on their way at once, each in memory twice


@dataclass(frozen=True)
class Shard:
    """A device's part of an array, copied to the host. at: of its first element. chunk: shape of the array's chunks."""

    name: str
    at: tuple[int, ...]
    chunk: tuple[int, ...]
    values: np.ndarray


def chunk_shape(shape: tuple[int, ...], itemsize: int, most_bytes: int) -> tuple[int, ...]:
    """The largest part of `shape`, which divides it and has at most `most_bytes`, cut along the first dims first."""
    chunk = list(shape)
    for dim, size in enumerate(shape):
        rest = math.prod(chunk) // max(size, 1) * itemsize
        fitting = [part for part in range(1, size + 1) if size % part == 0 and part * rest <= most_bytes]
        chunk[dim] = max(fitting, default=1)
        if fitting:
            break
    return tuple(chunk)


def _path(name: str) -> str:
    """model.params.w -> model/params.w, as Orbax has it too."""
    return name.replace(".", "/", 1)


def copy_shards(items: dict, chunk_bytes: int) -> tuple[list[Shard], dict[str, str]]:
    """(what this process is to write of `items`, {name: zarr.json}). Host memory: its parts of the state."""
    shards, headers = [], {}
    for path, array in jax.tree_util.tree_leaves_with_path(items):
        name = _path(name_of(path))
        chunk = chunk_shape(array.sharding.shard_shape(array.shape), array.dtype.itemsize, chunk_bytes)
        if is_first():
            headers[f"{name}/zarr.json"] = _header(array, chunk)
        for part in array.addressable_shards:
            if part.replica_id == 0:
                at = tuple(cut.indices(size)[0] for cut, size in zip(part.index, array.shape, strict=True))
                shards.append(Shard(name, at, chunk, np.array(part.data)))  # a copy: the array may be donated
    return shards, headers


def _header(array: jax.Array, chunk: tuple[int, ...]) -> str:
    """zarr.json of an array."""
    codec = {"name": "bytes", "configuration": {"endian": "little"}}
    values = {"zarr_format": 3, "node_type": "array", "shape": array.shape, "data_type": str(array.dtype), "fill_value": 0}
    values |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}, "codecs": [codec]}
    return json.dumps(values | {"chunk_key_encoding": {"name": "default"}, "attributes": {}})


def _chunks(shard: Shard) -> Iterator[tuple[str, np.ndarray]]:
    """(name of the object, values) of every chunk."""
    counts = [size // one for size, one in zip(shard.values.shape, shard.chunk, strict=True)]
    for place in np.ndindex(*counts):
        index = tuple(slice(i * one, (i + 1) * one) for i, one in zip(place, shard.chunk, strict=True))
        numbers = [first // one + i for first, one, i in zip(shard.at, shard.chunk, place, strict=True)]
        yield "/".join([shard.name, "c", *map(str, numbers)]), shard.values[index]


def write_shards(folder: Folder, shards: list[Shard], headers: dict[str, str]) -> dict[str, str]:
    """Write all of it; {name: sha256}. UserError if the bucket does not take it."""

    def write(item: tuple[str, np.ndarray]) -> tuple[str, str]:
        name, values = item
        content = values.tobytes()
        folder.write(name, content)
        return name, hashlib.sha256(content).hexdigest()

    texts = [(name, np.frombuffer(text.encode(), np.uint8)) for name, text in headers.items()]
    with ThreadPoolExecutor(_WRITES) as pool:
        return dict(pool.map(write, [*texts, *(chunk for shard in shards for chunk in _chunks(shard))]))
