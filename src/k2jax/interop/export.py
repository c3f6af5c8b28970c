"""A run's checkpoint as a published one: per-expert safetensors, config.json, tokenizer; streamed, bounded memory."""

import json
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from k2jax.data.saved_tokenizer import open_tokenizer
from k2jax.errors import UserError
from k2jax.files import must_be_new, whole_folder, write_atomic
from k2jax.interop.hf_config import hf_config
from k2jax.interop.published import all_weights, published_names, published_shape, to_published
from k2jax.interop.safetensor_files import NewTensor, write_tensors
from k2jax.interop.tokenizer_files import tokenizer_files
from k2jax.model.weights import Weight
from k2jax.runs.commits import arrays_of, read_record, sound_step
from k2jax.runs.folder import read_config
from k2jax.runs.mirror import open_run_folder
from k2jax.train.content import name_of
from k2jax.train.phases import rope_after
from k2jax.train.restore import open_array

DTYPES = {"bf16": ("BF16", "bfloat16"), "f32": ("F32", "float32")}  # ours: (safetensors', torch's)
FILE_BYTES = 5 * 10**9


def _new_tensors(arrays: Path, model, dtype: str) -> dict[str, NewTensor]:
    """Every published tensor, to be read from the checkpoint when it is written."""
    tensors = {}
    leaves = jax.tree_util.tree_leaves_with_path(all_weights(model), is_leaf=lambda x: isinstance(x, Weight))
    for path, weight in leaves:
        array = open_array(arrays, f"model.{name_of(path)}")
        stored = "F32" if weight.group is None else dtype  # the router bias decides near ties: it keeps its bits

        def make(index, weight=weight, array=array, stored=stored) -> np.ndarray:
            value = np.asarray(array[index].read().result())
            if stored == "BF16":
                value = value.astype(ml_dtypes.bfloat16)
            return to_published(weight, value)

        for index, name in published_names(weight):
            tensors[name] = NewTensor(published_shape(weight), stored, lambda i=index, m=make: m(i))
    return tensors


def export_run(
    run_dir: str | Path,
    to: str | Path,
    dtype: Literal["bf16", "f32"] = "bf16",
    step: int | None = None,
    rope: Literal["plain", "yarn"] | None = None,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Write step `step` (by default the newest) of a run to the new folder `to`; gives the step.

    rope: what config.json says of positions, by default what the step was trained with. The folder appears whole
    or not at all. Memory: one tensor and the checkpoint chunks that it touches. Raises UserError if `to` exists
    or is a URL, the run has no sound checkpoint, or its network no published form.
    """
    must_be_new(to)  # before the checkpoint's files are looked through
    files, to = open_run_folder(run_dir), Path(to)
    config = read_config(files.path)
    step = sound_step(files.checkpoints, step)
    rope = rope or rope_after(config, step)
    if rope == "yarn" and config.model.rope.factor is None:
        raise UserError("--rope yarn: needs model.rope.factor, which is None in this run; must be plain")
    tokenizer = open_tokenizer(files.tokenizer) if files.tokenizer.is_dir() else None
    ids = (tokenizer.bos, tokenizer.eos) if tokenizer else (None, None)
    stored, torch_name = DTYPES[dtype]
    values = hf_config(config.model, rope, config.data.sequence_length, torch_name, *ids)
    with whole_folder(to, "exporting") as aside:
        arrays = arrays_of(files.checkpoints, read_record(files.checkpoints, step))
        write_tensors(aside, _new_tensors(arrays, config.model, stored), file_bytes)
        for name, content in (tokenizer_files(tokenizer) if tokenizer else {}).items():
            write_atomic(aside / name, content)
        write_atomic(aside / "config.json", json.dumps(values, indent=2) + "\n")
    return step
