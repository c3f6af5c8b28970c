"""Commit records: checkpoints/STEP.json, written last, makes a step exist. Needs no jax.

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet.
"""

import json
import shutil
from pathlib import Path

from k2jax.errors import UserError
from k2jax.files import sha256_of, sync_folder, write_atomic


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


def commit(folder: Path, record: dict) -> None:
    """Make the step of `record` exist, its files being written."""
    sync_folder(folder)
    record["files"] = _digests(folder / str(record["step"]))
    write_atomic(folder / f"{record['step']}.json", json.dumps(record, indent=2) + "\n")


def held_parts(folder: Path, step: int) -> list[str]:
    """Names of what a committed step holds: ["model", "optimizer"], or ["model"] for an imported model."""
    return json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))["holds"]
