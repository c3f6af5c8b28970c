"""Checkpoints: Orbax writes the arrays, and a commit record of ours, written last, makes the step exist.

    checkpoints/120/        Orbax: model (params, router bias), optimizer (step, state, guard), run (config, position)
    checkpoints/120.json    the commit record; a folder without one is the rest of a save that did not end

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet.
"""

import threading
from dataclasses import asdict
from pathlib import Path

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from k2jax.config import CheckpointConfig, Config
from k2jax.errors import RunFailed
from k2jax.runs.commits import commit, committed_steps, remove_step
from k2jax.train.state import TrainState

CHUNK_BYTES = 2**26  # an export reads parameters matrix by matrix, and a chunk is the least that can be read


def _layout(path, value):
    """Chunks of an array along its stack dims first: whole layers and experts. Orbax asks about every leaf."""
    if not isinstance(value, jax.Array):
        return None
    stack = tuple(range(max(value.ndim - 2, 0)))
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=stack)


def _context() -> ocp.Context:
    context = ocp.Context()
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


def open_model_array(folder: Path, step: int, path: tuple[str, ...]) -> tensorstore.TensorStore:
    """One array of a step's model, such as ("params", "moe", "ffn", "gate"), to be read in parts. No cache is kept."""
    base = {"driver": "file", "path": f"{folder.resolve() / str(step) / 'model'}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()


def _check_readable(folder: Path, step: int, model: dict) -> None:
    """Raise RunFailed unless the step's items have their merged files, and the first array of its model opens.

    Orbax has saved without an error what it could not read back (a path that it misread, an interrupted merge).
    """
    items = [entry for entry in ("model", "optimizer") if (folder / str(step) / entry).is_dir()]
    if absent := [item for item in items if not (folder / str(step) / item / "manifest.ocdbt").is_file()]:
        raise RunFailed(f"{folder / str(step)}: cannot be read back: {', '.join(absent)} without manifest.ocdbt")
    path, leaf = jax.tree_util.tree_leaves_with_path(model)[0]
    try:
        found = open_model_array(folder, step, tuple(entry.key for entry in path)).shape
    except ValueError as error:
        raise RunFailed(f"{folder / str(step)}: cannot be read back: {error}") from None
    if found != leaf.shape:
        raise RunFailed(f"{folder / str(step)}: cannot be read back: shape {found} for {leaf.shape}")


def save_model(folder: Path, model: dict, config: Config) -> None:
    """Commit {"params", "router_bias"} alone as step 0: a model that can be used and exported, but not resumed."""
    folder.mkdir(parents=True)
    run = {"config": asdict(config), "data_position": {}}
    with _context():
        ocp.save_checkpointables(folder.resolve() / "0", {"model": model, "run": run})
    _check_readable(folder.resolve(), 0, model)
    commit(folder.resolve(), {"step": 0, "holds": ["model"], "data_position": {}})


class Saver:
    """Saves in the background, one step at a time; a failure is raised at the next call of any method."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._config = folder.resolve(), config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: TrainState, config: Config, data_position: dict) -> None:
        """Start saving `state`, which may be donated as soon as this returns. Waits for the save before it."""
        self.wait()
        run = {"config": asdict(config), "data_position": data_position}
        path = self._folder / str(step)
        with _context():
            response = ocp.save_checkpointables_async(path, {**parts(state), "run": run}, overwrite=True)
        record = {"step": step, "holds": sorted(parts(state)), "data_position": data_position}
        model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parts(state)["model"])
        arguments = response, record, model
        self._thread = threading.Thread(target=self._commit, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _commit(self, response, record: dict, model: dict) -> None:
        try:
            response.result(timeout=self._config.save_timeout_seconds)
            _check_readable(self._folder, record["step"], model)
            commit(self._folder, record)
            self._prune()
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        """Remove all but the newest `keep_last` committed steps."""
        for step in committed_steps(self._folder)[: -self._config.keep_last]:
            remove_step(self._folder, step)

    def poll(self) -> None:
        """Raise what a background save failed with."""
        if self._error is not None:
            error, self._error = self._error, None
            raise RunFailed(f"checkpoint in {self._folder} could not be saved: {error}") from error

    def join(self) -> None:
        """Return when no save is under way, without raising: for the end of a run that failed elsewhere."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when no save is under way; raise what one failed with."""
        self.join()
        self.poll()


def restore_run(folder: Path, step: int) -> dict:
    """The config and data position saved with `step`: {"config": ..., "data_position": ...}."""
    return ocp.load_checkpointables((folder / str(step)).resolve(), {"run": None})["run"]


def restore_model(folder: Path, step: int, abstract: dict) -> dict:
    """{"params", "router_bias"} of `step`, laid out as `abstract`, the same of ShapeDtypeStructs, says."""
    return ocp.load_checkpointables((folder / str(step)).resolve(), {"model": abstract})["model"]


def restore_state(folder: Path, step: int, abstract: TrainState) -> TrainState:
    """The TrainState of `step` on the mesh of `abstract`, whatever mesh it was saved from."""
    stored = ocp.load_checkpointables((folder / str(step)).resolve(), parts(abstract))
    return TrainState(**stored["model"], **stored["optimizer"])
