"""Commit records: checkpoints/STEP.json, written last, makes a step exist. Needs no jax.

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet.
"""

import re
import shutil
from pathlib import Path

from k2jax.errors import UserError
from k2jax.files import read_sealed, sha256_of, sync_folder, write_sealed


def committed_steps(folder: Path) -> list[int]:
    """Steps that can be restored, oldest first."""
    names = (record.stem for record in folder.glob("*.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def _record(folder: Path, step: int) -> dict:
    """The commit record of a step. UserError if it was changed, or belongs to another step."""
    path = folder / f"{step}.json"
    record = read_sealed(path)
    kinds = {"step": int, "holds": list, "files": dict, "data_position": dict}
    if wrong := [name for name, kind in kinds.items() if type(record.get(name)) is not kind]:
        raise UserError(f"{path}: is not a commit record: {', '.join(wrong)} missing or of another type")
    if record["step"] != step:
        raise UserError(f"{path}: is the record of step {record['step']}; give it its name back")
    return record


def _digests(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def damage(folder: Path, step: int) -> list[str]:
    """Every file of a committed step that differs from its record; [] for a sound step.

    Orbax itself restores flipped bits without an error.
    """
    try:
        expected = _record(folder, step)["files"]
    except UserError as error:
        return [*error.problems]
    found = _digests(folder / str(step))
    return [
        f"{folder / str(step) / name}: {'is missing' if name not in found else 'is not what was written (sha256)'}"
        for name in expected
        if found.get(name) != expected[name]
    ]


def sound_step(folder: Path, step: int | None) -> int:
    """`step`, or for None the newest committed one. Raises UserError if it is not there, or damaged."""
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
    """Move the newest steps that are damaged to ../damaged; what was wrong. Raises UserError if none is sound."""
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


def _saves(folder: Path) -> list[str]:
    """Names of what saves make, finished or not: STEP, STEP.json and Orbax's temporary folders of it; never a link."""
    made = re.compile(r"\d+(\.json(\.tmp)?|\.orbax-checkpoint-tmp.*)?")
    entries = folder.glob("*")
    return sorted(entry.name for entry in entries if made.fullmatch(entry.name) and not entry.is_symlink())


def newest_step(folder: Path) -> int | None:
    """The step to resume from, or None where nothing was ever trained.

    Raises UserError if steps were saved but none is committed: starting again from step 0 would throw them away.
    """
    if steps := committed_steps(folder):
        return steps[-1]
    lost = [name for name in _saves(folder) if not name.startswith("0")]
    if lost:
        raise UserError(
            f"{folder}: holds {', '.join(sorted(lost))} but no commit record (STEP.json), so no step can be trusted; "
            "move the folder away to start from step 0"
        )
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what unfinished saves left behind; returns the names. What k2jax did not make stays."""
    committed = {str(step) for step in committed_steps(folder)}
    left = [folder / name for name in _saves(folder) if name.removesuffix(".json") not in committed]
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return sorted(entry.name for entry in left)


def commit(folder: Path, record: dict) -> None:
    """Make the step of `record` exist, its files being written."""
    sync_folder(folder)
    record["files"] = _digests(folder / str(record["step"]))
    write_sealed(folder / f"{record['step']}.json", record)


def held_parts(folder: Path, step: int) -> list[str]:
    """Names of what a committed step holds: ["model", "optimizer"], or ["model"] for an imported model."""
    return _record(folder, step)["holds"]
