"""Folders of safetensors files: looked at whole before anything is read, read lazily, written tensor by tensor."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from k2jax.errors import UserError, first_of
from k2jax.files import SMALL_BYTES, read_json, sync_file, write_atomic

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """The position of a tensor in a file; `dtype` is the file's own word for it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor as a read-only view of the file; only what is then used is read from the disk."""
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape or (1,)).reshape(self.shape)


def _is_foreign_link(path: Path, folder: Path) -> bool:
    """True if `path` is a symbolic link, other than those of the Hugging Face cache (snapshots/REV/F -> blobs/HASH)."""
    cached = folder.parent.name == "snapshots" and path.resolve().parent == folder.parent.parent / "blobs"
    return path.is_symlink() and not cached


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises UserError if it is not a whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > SMALL_BYTES:
            raise UserError(
                f"{path}: is not a whole safetensors file: its header has more than {SMALL_BYTES >> 20} MiB"
            )
        with safe_open(path, framework="numpy"):  # the library's own check: offsets, sizes, nothing left over
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file: {error}") from None
    with open(path, "rb") as file:
        file.seek(8)
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _is_file_name(name: object) -> bool:
    """True for text that a file system takes as a name or a path; it need not exist."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name.encode("utf-8")) < 256  # no NUL, no surrogate


def _listed(folder: Path) -> dict[str, str] | None:
    """{tensor: file name} of the index, None where there is none."""
    path = folder / INDEX
    if not path.exists():
        return None
    value = read_json(path, follow_links=True)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{path}: weight_map must map the names of tensors to file names")
    wrong = sorted({repr(file)[:60] for file in names.values() if not _is_file_name(file)})
    if wrong:
        raise UserError(*first_of([f"{path}: weight_map: {file} must be the name of a file" for file in wrong]))
    return names


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, single or sharded. UserError with all that is wrong with its files."""
    listed = _listed(folder)
    present = sorted(folder.glob("*.safetensors"))
    paths = sorted({folder / file for file in listed.values()}) if listed is not None else present
    problems = [f"{path}: is not named in {INDEX}; remove it" for path in present if path not in paths]
    if not paths:
        problems.append(f"{folder}: has no .safetensors file")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        if path.parent != folder:
            problems.append(f"{folder / INDEX}: names {path}, which is not a file of the same folder")
        elif _is_foreign_link(path, folder):
            problems.append(f"{path}: is a symbolic link to {path.readlink()}; put the file itself there")
        elif not path.is_file():
            problems.append(f"{path}: is missing")
        else:
            try:
                found = _tensors_of(path)
            except UserError as error:
                problems += error.problems
                continue
            problems += [f"{name}: is in {tensors[name].path} and in {path}" for name in found if name in tensors]
            if listed is not None:
                wrong = [name for name in found if folder / listed.get(name, "") != path]
                problems += [f"{name}: is in {path}, the index says {listed.get(name)}" for name in wrong]
                absent = [name for name, file in listed.items() if folder / file == path and name not in found]
                problems += [f"{name}: the index says {path}, which does not hold it" for name in absent]
            tensors |= found
    if problems:
        raise UserError(*first_of(problems))
    return tensors


class NewTensor:
    """A tensor to be written: its shape, its dtype, and a function that makes it when its turn comes."""

    def __init__(self, shape: tuple[int, ...], dtype: str, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.make = shape, dtype, make

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def _write_file(path: Path, tensors: dict[str, NewTensor]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            value = np.ascontiguousarray(tensor.make(), DTYPES[tensor.dtype])
            assert value.shape == tensor.shape, name
            file.write(value.view(np.uint8).data if value.ndim else value.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _filled(tensors: dict[str, NewTensor], limit: int) -> Iterator[dict[str, NewTensor]]:
    """The tensors in order, in portions of at most `limit` bytes (or of one larger tensor)."""
    portion, size = {}, 0
    for name, tensor in tensors.items():
        if portion and size + tensor.size > limit:
            yield portion
            portion, size = {}, 0
        portion[name] = tensor
        size += tensor.size
    yield portion


def write_tensors(folder: Path, tensors: dict[str, NewTensor], limit: int) -> None:
    """Write files of at most `limit` bytes, and their index where there are several. One tensor in memory at a time."""
    portions = list(_filled(tensors, limit))
    names = [
        f"model-{i:05}-of-{len(portions):05}.safetensors" if len(portions) > 1 else "model.safetensors"
        for i in range(1, len(portions) + 1)
    ]
    for name, portion in zip(names, portions, strict=True):
        _write_file(folder / name, portion)
    if len(portions) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
            "weight_map": {t: name for name, portion in zip(names, portions, strict=True) for t in portion},
        }
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    sync_file(folder)
