"""Checkpoints: Orbax writes the arrays, and a commit record of ours, written last, makes the step exist.

    checkpoints/120/        Orbax: model (params, router bias), optimizer (step, state, guard), run (config, position)
    checkpoints/120.json    the commit record; a folder without one is the rest of a save that did not end

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet.
"""

import json
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from k2jax.config import CheckpointConfig, Config, RunFailed, UserError
from k2jax.files import sha256_of, sync_folder, write_atomic
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


def committed_steps(folder: Path) -> list[int]:
    """Steps that can be restored, oldest first."""
    return sorted(int(record.stem) for record in folder.glob("*.json") if record.stem.isdigit())


def _digests(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def damage(folder: Path, step: int) -> list[str]:
    """What is wrong with the files of a committed step, compared with its record; [] for a sound one.

    Orbax itself restores flipped bits without a word.
    """
    record = json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))
    expected, found = record["files"], _digests(folder / str(step))
    return [
        f"{folder / str(step) / name}: {'is missing' if name not in found else 'is not what was written (sha256)'}"
        for name in expected
        if found.get(name) != expected[name]
    ]


def sound_step(folder: Path, step: int | None) -> int:
    """`step`, or for None the newest committed one. Raises UserError where it is not there, or damaged."""
    steps = committed_steps(folder)
    if not steps:
        raise UserError(f"{folder.parent}: has no committed checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: is not a committed step; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    if wrong := damage(folder, step):
        raise UserError(*wrong, "give another --step, or resume the training, which goes back to the newest sound step")
    return step


def set_damaged_aside(folder: Path) -> list[str]:
    """Move the newest steps that are damaged to ../damaged; what was wrong. Raises UserError where none is sound."""
    problems, bad = [], []
    for step in reversed(committed_steps(folder)):
        if not (wrong := damage(folder, step)):
            break
        problems += wrong
        bad.append(step)
    else:
        if problems:
            raise UserError(
                *problems, f"{folder}: no sound checkpoint is left; restore one, or begin a new train.run_dir"
            )
    for step in bad:
        aside = folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        for name in (f"{step}.json", str(step)):
            shutil.rmtree(aside / name, ignore_errors=True)
            (folder / name).rename(aside / name)
    return problems


def newest_step(folder: Path) -> int | None:
    """The step to resume from, or None where nothing was ever trained.

    Raises UserError where steps were saved but none is committed: starting again from step 0 would throw them away.
    """
    if steps := committed_steps(folder):
        return steps[-1]
    lost = [entry.name for entry in folder.glob("*") if entry.name.split(".")[0] not in ("", "0")]
    if lost:
        raise UserError(
            f"{folder}: holds {', '.join(sorted(lost))} but no commit record (STEP.json), so no step can be trusted; "
            "move the folder away to start from step 0"
        )
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what unfinished saves left behind; returns the names."""
    committed = {str(step) for step in committed_steps(folder)}
    left = [e for e in folder.glob("*") if e.name.removesuffix(".json") not in committed]
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return sorted(entry.name for entry in left)


def model_part(params: dict, router_bias: dict) -> dict:
    """What generation needs of a state."""
    return {"params": params, "router_bias": router_bias}


def parts(state: TrainState) -> dict:
    """The state as it is stored: the model, apart from what only training needs."""
    return {
        "model": model_part(state.params, state.router_bias),
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "guard": state.guard},
    }


def _commit(folder: Path, record: dict) -> None:
    """Make the step of `record` exist, its files being written."""
    sync_folder(folder)
    record["files"] = _digests(folder / str(record["step"]))
    write_atomic(folder / f"{record['step']}.json", json.dumps(record, indent=2) + "\n")


def save_model(folder: Path, model: dict, config: Config) -> None:
    """Commit {"params", "router_bias"} alone as step 0: a model that can be used and exported, but not resumed."""
    folder.mkdir(parents=True)
    run = {"config": asdict(config), "data_position": {}}
    with _context():
        ocp.save_checkpointables(folder.absolute() / "0", {"model": model, "run": run})
    _commit(folder.absolute(), {"step": 0, "holds": ["model"], "data_position": {}})


class Saver:
    """Saves in the background, one step at a time; a failure is raised at the next call of any method."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._config = folder.absolute(), config
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
        self._thread = threading.Thread(
            target=self._commit, args=(step, response, record), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _commit(self, step: int, response, record: dict) -> None:
        try:
            response.result(timeout=self._config.save_timeout_seconds)
            _commit(self._folder, record)
            self._prune()
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        """Remove all but the newest `keep_last`; the record goes first, so that no half step is ever listed."""
        for step in committed_steps(self._folder)[: -self._config.keep_last]:
            (self._folder / f"{step}.json").unlink()
            sync_folder(self._folder)
            shutil.rmtree(self._folder / str(step))

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


def held_parts(folder: Path, step: int) -> list[str]:
    """Names of what a committed step holds: ["model", "optimizer"], or ["model"] for an imported model."""
    return json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))["holds"]


def open_model_array(folder: Path, step: int, path: tuple[str, ...]) -> tensorstore.TensorStore:
    """One array of a step's model, such as ("params", "moe", "ffn", "gate"), to be read in parts. No cache is kept."""
    base = {"driver": "file", "path": f"{folder.absolute() / str(step) / 'model'}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()


def restore_run(folder: Path, step: int) -> dict:
    """The config and data position saved with `step`: {"config": ..., "data_position": ...}."""
    return ocp.load_checkpointables((folder / str(step)).absolute(), {"run": None})["run"]


def restore_model(folder: Path, step: int, abstract: dict) -> dict:
    """{"params", "router_bias"} of `step`, laid out as `abstract`, the same of ShapeDtypeStructs, says."""
    return ocp.load_checkpointables((folder / str(step)).absolute(), {"model": abstract})["model"]


def restore_state(folder: Path, step: int, abstract: TrainState) -> TrainState:
    """The TrainState of `step` on the mesh of `abstract`, whatever mesh it was saved from."""
    stored = ocp.load_checkpointables((folder / str(step)).absolute(), parts(abstract))
    return TrainState(**stored["model"], **stored["optimizer"])
