"""Commit records: checkpoints/STEP.json, written last, makes a step exist. Needs no jax.

Steps are found by their records alone, never by Orbax's listing: it shows steps whose save has not ended yet. Of a run
in a bucket `folder` is that of its mirror (runs/mirror.py), which has the records and not the arrays.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from k2jax.errors import RunFailed, UserError, first_of
from k2jax.files import read_sealed, sealed, sha256_of, sync_file, write_sealed
from k2jax.runs.folder import RunFolder, check_held
from k2jax.runs.identity import identity
from k2jax.runs.mirror import mirror_of, shown


def _remove(entry: Path) -> None:
    """Remove a folder, a file or a link, not what it leads to. What is not there is left so."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def committed_steps(folder: Path) -> list[int]:
    """Steps that can be restored, oldest first."""
    names = (record.stem for record in folder.glob("*.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def arrays_of(folder: Path, record: dict) -> Path:
    """The folder of a step's arrays: STEP, beside its commit record, or of a step saved to a bucket ../arrays/STEP-WRITER."""
    if "folder" in record:
        return RunFolder(folder.parent).arrays / record["folder"]
    return folder / str(record["step"])


def _record_of(folder: Path, step: int, expected: dict[str, str] | None) -> dict:
    """The commit record of a step. UserError if it was changed, or belongs to another step or not to `expected`."""
    path = folder / f"{step}.json"
    if (mirror := mirror_of(folder)) is not None:
        mirror.fetch_record(path)
    record = read_sealed(path)
    kinds = {"step": int, "holds": list, "files": dict, "content": dict, "data_position": dict, "run": type(expected)}
    kinds |= {"folder": str} if "folder" in record else {}
    if wrong := [name for name, kind in kinds.items() if type(record.get(name)) is not kind]:
        raise UserError(f"{path}: is not a commit record: {', '.join(wrong)} missing or of another type")
    if record["step"] != step:
        raise UserError(f"{path}: is the record of step {record['step']}; give it its name back")
    if not re.fullmatch(rf"{step}-[0-9a-f]+", record.get("folder", f"{step}-0")):
        raise UserError(f"{path}: its folder is {record['folder']!r}, must be {step}-WRITER; restore it from a copy")
    if expected is not None and record["run"] != expected:
        differs = [name for name in expected if record["run"].get(name) != expected[name]]
        rule = "it was copied from elsewhere; move it away" if "id" in differs else "restore config.json from a copy"
        raise UserError(f"{path}: belongs to another run, its {' and '.join(differs)} differ from those of {folder.parent}; {rule}")
    return record


def read_record(folder: Path, step: int) -> dict:
    """The commit record of a step. UserError if it was changed, or belongs to another step or run."""
    return _record_of(folder, step, identity(folder.parent))


def remove_step(folder: Path, step: int) -> None:
    """Remove a committed step. The record goes first, so that no half step is ever listed."""
    path, arrays = folder / f"{step}.json", folder / str(step)
    with contextlib.suppress(UserError):  # what its record does not tell is left to `remove_leftovers`
        arrays = arrays_of(folder, read_record(folder, step))
    if (mirror := mirror_of(folder)) is not None:
        return mirror.remove_step(path, arrays)
    _remove(path)
    sync_file(folder)
    _remove(arrays)


_READS = 8  # objects of a bucket that are read at once, each in memory
_WRITER = re.compile(r"(?:ocdbt\.|array_metadatas/)process_([0-9]+)(?:/|$)")  # Orbax's names of what one process writes


def _files_of(folder: Path, process: int, processes: int) -> list[Path]:
    """The files below `folder` that one of the processes of a save wrote: the first also what belongs to none."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    writers = [_WRITER.search(path.relative_to(folder).as_posix()) for path in paths]
    return [path for path, match in zip(paths, writers, strict=True) if (int(match[1]) % processes if match else 0) == process]


def file_digests(folder: Path, step: int, process: int = 0, processes: int = 1) -> dict[str, str]:
    """{relative path: sha256} of the files of a step that one of the processes wrote, when they are on the disk for good."""
    root = folder / str(step)
    paths = _files_of(root, process, processes)
    for place in (*paths, *{path.parent for path in paths}):  # Orbax leaves some to the operating system
        sync_file(place)
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in paths}


def damage(folder: Path, step: int, process: int = 0, processes: int = 1) -> list[str]:
    """Every file of a committed step that differs from its record; [] for a sound step.

    process, processes: only of the files that fall to one of so many, to be read by all of them at once. Raises
    UserError if the run's own files are damaged. Orbax itself restores flipped bits without an error.
    """
    run = identity(folder.parent)
    try:
        record = _record_of(folder, step, run)
    except UserError as error:
        return [*error.problems]
    mirror, expected, root = mirror_of(folder), record["files"], arrays_of(folder, record)
    arrays = None if mirror is None else mirror.folder(root)

    def problem(name: str) -> str | None:
        where = f"{root if arrays is None else arrays}/{name}"
        try:
            found = sha256_of(root / name) if arrays is None else arrays.describe(name)["sha256"]
        except (FileNotFoundError, NotADirectoryError):
            return f"{where}: is missing"
        except OSError as error:  # of a failing disk, say
            return f"{where}: cannot be read: {error.strerror}"
        except UserError as error:  # of a bucket
            return str(error)
        return None if found == expected[name] else f"{where}: is not what was written (sha256)"

    with ThreadPoolExecutor(1 if arrays is None else _READS) as pool:
        return list(filter(None, pool.map(problem, sorted(expected)[process::processes])))


def check_committed(steps: list[int], step: int | None) -> None:
    """UserError if `step`, as a user gives it, is none of these; None is any."""
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--step {step}: is not a committed step; there are {there}")


def sound_step(folder: Path, step: int | None) -> int:
    """`step`, or for None the newest committed one. Raises UserError if it is not there, or damaged."""
    steps = committed_steps(folder)
    if not steps:
        raise UserError(f"{shown(folder.parent)}: has no committed checkpoint yet")
    check_committed(steps, step)
    step = steps[-1] if step is None else step
    if wrong := damage(folder, step):
        raise UserError(*wrong, "give another --step, or resume the training, which goes back to the newest sound step")
    return step


def find_damaged(
    folder: Path, steps: list[int], find: Callable[[Path, int], list[str]] = damage
) -> tuple[list[int], list[str]]:
    """(the newest of `steps`, as far as they are damaged; all that is wrong with them). UserError if none is sound.

    steps: `committed_steps`. find: `damage`, or what does its work in several processes.
    """
    problems, bad = [], []
    for step in reversed(steps):
        if not (wrong := find(folder, step)):
            return bad, problems
        problems += wrong
        bad.append(step)
    if problems:
        raise UserError(*problems, f"{folder}: no sound checkpoint is left; restore one, or begin a new train.run_dir")
    return bad, problems


def move_steps(folder: Path, steps: list[int], aside: Path) -> None:
    """Move steps of a run on a disk to another folder there, the records first. OSError if that does not take them."""
    aside.mkdir(exist_ok=True)
    for step in sorted(steps, reverse=True):  # whatever remains after a crash is a run that ends earlier
        for name in (f"{step}.json", str(step)):
            if os.path.lexists(folder / name):  # the files of a step may be gone altogether
                _remove(aside / name)
                (folder / name).rename(aside / name)


def set_aside(folder: Path, steps: list[int], problems: list[str]) -> None:
    """Move these steps to ../damaged. UserError, with what is wrong with them, if that does not take them."""
    aside, mirror = RunFolder(folder.parent).damaged, mirror_of(folder)
    for step in steps:
        if mirror is not None:  # objects have no other name to be given: the arrays stay
            mirror.move_record(folder / f"{step}.json", aside / f"{step}.json")
            continue
        try:
            move_steps(folder, [step], aside)
        except OSError as error:
            raise UserError(*problems, f"{aside}: cannot take them: {error.strerror}; move it away") from None


def _saves(folder: Path) -> list[str]:
    """Names of what saves make, finished or not: STEP, STEP.json and Orbax's temporary folders of it; never a link.

    Of a run in a bucket STEP-WRITER.
    """
    if (mirror := mirror_of(folder)) is not None:
        return [name for name in mirror.saves() if re.fullmatch(r"[0-9]+-[0-9a-f]+", name)]
    made = re.compile(r"(0|[1-9][0-9]*)(\.json(\.tmp)?|\.orbax-checkpoint-tmp.*)?")
    entries = folder.glob("*")
    return sorted(entry.name for entry in entries if made.fullmatch(entry.name) and not entry.is_symlink())


def not_ours(folder: Path) -> list[str]:
    """Names in the folder that no save makes: copies, notes, links, lost+found. They are never removed."""
    if mirror_of(folder) is not None:
        return []  # nothing else is looked at, and only what is ours removed
    return sorted({entry.name for entry in folder.glob("*")} - {*_saves(folder)})


def newest_step(folder: Path) -> int | None:
    """The step to resume from, or None where nothing was ever trained.

    Raises UserError if steps were saved but none is committed: starting again from step 0 would throw them away.
    """
    if steps := committed_steps(folder):
        return steps[-1]
    lost = [name for name in _saves(folder) if re.split("[.-]", name)[0] != "0"]
    if lost:
        raise UserError(
            f"{folder}: holds {', '.join(sorted(lost))} but no commit record (STEP.json), so no step can be trusted; "
            "move the folder away to start from step 0"
        )
    return None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what unfinished saves left behind; returns the names. What k2jax did not make stays."""
    committed = {str(step) for step in committed_steps(folder)}
    if (mirror := mirror_of(folder)) is not None:
        files = RunFolder(folder.parent)
        committed |= {str(step) for step in committed_steps(files.damaged)}  # their arrays have stayed
        left = [name for name in _saves(folder) if name.split("-")[0] not in committed]
        for name in left:
            mirror.remove(files.arrays / name)
        return left
    left = [name for name in _saves(folder) if name.removesuffix(".json") not in committed]
    for name in left:
        _remove(folder / name)
    return left


def commit(folder: Path, record: dict) -> None:
    """Make the step of `record` exist. Its files are on the disk, and `record` has everything but the run's identity.

    record: step, holds (names of its items), files ({relative path: sha256}), content ({array: digests of its content}),
    data_position; in a bucket also folder (STEP-WRITER). Raises RunFailed if it leaves out a file of the step, for which
    nobody would then vouch, or if another process holds the run's lock by now or has committed the step.
    """
    path, record = folder / f"{record['step']}.json", record | {"run": identity(folder.parent)}
    if (mirror := mirror_of(folder)) is not None:
        record["writer"] = mirror.lock.holder
        return mirror.commit(path, json.dumps(sealed(record), indent=2) + "\n")
    root = arrays_of(folder, record)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    if lost := sorted(found - record["files"].keys()):  # who wrote them did not see them in the finished folder
        rule = "do all hosts see the same in train.run_dir, at once?"
        raise RunFailed(f"{root}: no process vouches for {', '.join(first_of(lost, 3))}; {rule}")
    sync_file(folder)
    check_held(folder.parent)
    write_sealed(path, record)


def held_parts(folder: Path, step: int) -> list[str]:
    """Names of what a committed step holds: ["model", "optimizer"], or ["model"] for an imported model.

    Raises UserError if its record was changed.
    """
    return read_record(folder, step)["holds"]


def is_model_alone(folder: Path) -> bool:
    """True for an imported model: the newest step whose record can be read holds no optimizer's state."""
    for step in reversed(committed_steps(folder)):
        with contextlib.suppress(UserError):  # a damaged step is set aside when the run resumes
            return "optimizer" not in held_parts(folder, step)
    return False
