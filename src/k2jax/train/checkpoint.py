"""Checkpoints: Orbax writes the arrays, and a commit record of ours, written last, makes the step exist.

    checkpoints/120/        Orbax: items model (params, router bias) and optimizer (step, state, guard)
    checkpoints/120.json    the commit record; a folder without one is the rest of a save that did not end

In a bucket train/bucket_arrays.py writes them, to arrays/120-WRITER/.

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from k2jax.config import CheckpointConfig
from k2jax.errors import RunFailed, first_of
from k2jax.processes import barrier, count, gather, index, is_first
from k2jax.runs.commits import arrays_of, commit, committed_steps, file_digests, remove_step
from k2jax.runs.folder import check_held
from k2jax.runs.mirror import mirror_of, shown, upload
from k2jax.train.bucket_arrays import copy_shards, write_shards
from k2jax.train.content import content_sums, name_of, named_digests
from k2jax.train.restore import open_array, restore_items
from k2jax.train.state import TrainState

CHUNK_BYTES = 2**26  # an export reads parameters matrix by matrix, and a chunk is the least that can be read


def _layout(path, value):
    """Chunks of an array along its stack dims first: whole layers and experts. Orbax asks about every leaf."""
    if not isinstance(value, jax.Array):
        return None
    stack = tuple(range(max(value.ndim - 2, 0)))
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=stack)


def _context(seconds: int = 1200) -> ocp.Context:
    """Options of a save; a process that waits longer for the others gives up."""
    context = ocp.Context()
    context.asynchronous.timeout_secs = seconds
    context.array.saving.scoped_storage_options_creator = _layout
    return context


def model_part(params: dict, router_bias: dict) -> dict:
    """The part of a state that generation needs."""
    return {"params": params, "router_bias": router_bias}


def parts(state: TrainState) -> dict:
    """The state as it is stored: the model, apart from what only training needs."""
    return {
        "model": model_part(state.params, state.router_bias),
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "guard": state.guard},
    }


def _check_readable(arrays: Path, items: dict) -> None:
    """Raise RunFailed unless every array of every item opens, with its shape.

    items: the arrays or their shapes. Orbax has saved without an error what it could not read back (a path that it
    misread, an interrupted merge).
    """
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(items):
        name = name_of(path)
        try:
            stored = open_array(arrays, name).shape
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if stored != leaf.shape:
            problems.append(f"{name}: shape {stored} for {leaf.shape}")
    if problems:
        raise RunFailed(f"{shown(arrays)}: cannot be read back: {'; '.join(first_of(problems, 3))}")


def _commit(folder: Path, record: dict, items: dict, sums: jax.Array, files: dict[str, str], seconds: float) -> None:
    """In all processes, when each has written its `files` ({name: sha256}); the first makes the step exist.

    record: step, data_position, and of a run in a bucket folder.
    """
    written = gather("save", files, seconds)
    if is_first():
        _check_readable(arrays_of(folder, record), items)
        content = named_digests(items, np.asarray(jax.device_get(sums)))
        files = {name: digest for part in written for name, digest in part.items()}
        commit(folder, record | {"holds": sorted(items), "files": files, "content": content})


def save_model(folder: Path, model: dict) -> None:
    """Commit {"params", "router_bias"} alone as step 0: a model that can be used and exported, but not resumed."""
    folder.mkdir(parents=True)
    items = {"model": model}
    with _context():
        ocp.save_checkpointables(folder.resolve() / "0", items)
    _commit(folder, {"step": 0, "data_position": {}}, items, content_sums(items), file_digests(folder, 0), 0)


class Saver:
    """Saves in the background, one step at a time; a failure is raised at the next call of any method.

    on_commit(step): called in a thread, when the step is committed.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, on_commit: Callable[[int], None] = lambda step: None):
        folder.mkdir(parents=True, exist_ok=True)
        self._on_commit = on_commit
        self._folder, self._config = folder.absolute(), config  # a link stays one: beside it is the run it belongs to
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: TrainState, data_position: dict) -> None:
        """Start saving `state`, which may be donated as soon as this returns. Waits for the save before it."""
        self.wait()
        items, record = parts(state), {"step": step, "data_position": data_position}
        sums = content_sums(items)
        try:
            # Processes compare the path through their devices, by transfers that the loop's guard forbids.
            with _context(self._config.save_timeout_seconds), jax.transfer_guard("allow"):
                write = self._begin(record, items)
        except OSError as error:
            raise RunFailed(f"checkpoint in {shown(self._folder)} could not be saved: {error}") from error
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), items)
        self._thread = threading.Thread(target=self._finish, args=(write, record, shapes, sums), name="checkpoint", daemon=True)
        self._thread.start()

    def _begin(self, record: dict, items: dict) -> Callable[[], dict[str, str]]:
        """Begin to write the arrays. What it returns ends it, and gives the sha256 of the files of this process."""
        step = record["step"]
        if (mirror := mirror_of(self._folder.parent)) is not None:
            record["folder"] = f"{step}-{mirror.writer}"  # what another process, cut off, still writes is not in it
            own, headers = copy_shards(items, CHUNK_BYTES)
            return lambda: write_shards(mirror.folder(arrays_of(self._folder, record)), own, headers)
        check_held(self._folder.parent)  # before a step of the same number is overwritten
        response = ocp.save_checkpointables_async(self._folder.resolve() / str(step), items, overwrite=True)

        def end() -> dict[str, str]:
            response.result(timeout=self._config.save_timeout_seconds)
            return file_digests(self._folder, step, index(), count())

        return end

    def _finish(self, write: Callable[[], dict[str, str]], record: dict, items: dict, sums: jax.Array) -> None:
        try:
            _commit(self._folder, record, items, sums, write(), self._config.save_timeout_seconds)
            barrier("committed", self._config.save_timeout_seconds)  # one that ends now ends the first, which writes, with it
            self._on_commit(record["step"])
            if is_first():
                self._prune()
            else:
                upload(self._folder.parent)  # its log
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        """Remove all but the newest `keep_last` committed steps, and those that are kept for good."""
        for step in committed_steps(self._folder)[: -self._config.keep_last]:
            if self._config.keep_every is None or step % self._config.keep_every:
                remove_step(self._folder, step)

    def poll(self) -> None:
        """Raise what a background save failed with."""
        if self._error is not None:
            error, self._error = self._error, None
            raise RunFailed(f"checkpoint in {shown(self._folder)} could not be saved: {error}") from error

    def is_saving(self) -> bool:
        """True while a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Return when no save is under way, or after `seconds`; without raising, for a run that failed elsewhere."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def wait(self) -> None:
        """Return when no save is under way; raise what one failed with."""
        self.join()
        self.poll()


def restore_model(folder: Path, step: int, abstract: dict) -> dict:
    """{"params", "router_bias"} of `step`, laid out as `abstract`, the same of ShapeDtypeStructs, says.

    Raises as `restore_items`.
    """
    return restore_items(folder, step, {"model": abstract})["model"]


def restore_state(folder: Path, step: int, abstract: TrainState) -> TrainState:
    """The TrainState of `step` on the mesh of `abstract`, whatever mesh it was saved from. Raises as `restore_items`."""
    stored = restore_items(folder, step, parts(abstract))
    return TrainState(**stored["model"], **stored["optimizer"])
