"""Committed steps whose files or records are damaged, gone, or somewhere else."""

import shutil

import pytest

from k2jax.errors import RunFailed, UserError
from k2jax.files import sha256_of, write_sealed
from k2jax.runs import commits
from k2jax.runs.commits import (
    commit,
    committed_steps,
    damage,
    file_digests,
    find_damaged,
    is_model_alone,
    remove_step,
    set_aside,
)


def make_steps(run, *steps, holds=("model", "optimizer")):
    """The checkpoints folder of `run` with these steps committed, one file each."""
    folder = run / "checkpoints"
    for step in steps:
        (folder / str(step)).mkdir(parents=True)
        (folder / str(step) / "arrays").write_text("x" * step)
        record = {"step": step, "holds": [*holds], "files": file_digests(folder, step), "content": {}, "data_position": {}}
        commit(folder, record)
    return folder


def set_damaged_aside(folder):
    steps, problems = find_damaged(folder, committed_steps(folder))
    set_aside(folder, steps, problems)
    return problems


def change_record(folder, step):
    path = folder / f"{step}.json"
    path.write_text(path.read_text().replace('"holds"', '"helds"'))


def test_a_step_without_its_folder_is_set_aside(tmp_path):
    folder = make_steps(tmp_path, 4, 8)
    shutil.rmtree(folder / "8")
    assert set_damaged_aside(folder) == [f"{folder}/8/arrays: is missing"]
    assert committed_steps(folder) == [4] and [e.name for e in (tmp_path / "damaged").iterdir()] == ["8.json"]


def test_what_was_set_aside_before_gives_way(tmp_path):
    folder = make_steps(tmp_path, 4, 8)
    (folder / "8" / "arrays").write_text("y")
    (tmp_path / "damaged" / "8.json").mkdir(parents=True)
    (tmp_path / "damaged" / "8").write_text("")
    set_damaged_aside(folder)
    assert (tmp_path / "damaged" / "8" / "arrays").read_text() == "y" and committed_steps(folder) == [4]


def test_a_file_in_place_of_the_folder_for_damaged_steps(tmp_path):
    folder = make_steps(tmp_path, 4, 8)
    (folder / "8" / "arrays").write_text("y")
    (tmp_path / "damaged").write_text("mine")
    with pytest.raises(UserError, match="8/arrays: is not what .*\n.*damaged: cannot take them: File exists; move it"):
        set_damaged_aside(folder)
    assert committed_steps(folder) == [4, 8] and (tmp_path / "damaged").read_text() == "mine"


def test_a_damaged_record_does_not_stop_a_resume(tmp_path):
    """It is set aside as damaged arrays are; until then the step before tells what the run is."""
    folder = make_steps(tmp_path, 4, 8)
    change_record(folder, 8)
    assert not is_model_alone(folder)
    (problem,) = set_damaged_aside(folder)
    assert "8.json: was changed" in problem and committed_steps(folder) == [4]


def test_an_imported_model_is_known(tmp_path):
    assert is_model_alone(make_steps(tmp_path, 0, holds=["model"]))
    assert not is_model_alone(tmp_path / "none")


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    folder = make_steps(tmp_path, 4)

    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(commits, "sha256_of", failing)
    assert damage(folder, 4) == [f"{folder}/4/arrays: cannot be read: Input/output error"]


def test_a_step_moved_to_another_disk_is_removed_without_what_its_link_leads_to(tmp_path):
    folder = make_steps(tmp_path, 4, 8)
    (folder / "4").rename(tmp_path / "big")
    (folder / "4").symlink_to(tmp_path / "big")
    assert damage(folder, 4) == []
    remove_step(folder, 4)
    assert committed_steps(folder) == [8] and sorted(e.name for e in folder.iterdir()) == ["8", "8.json"]
    assert sha256_of(tmp_path / "big" / "arrays")


def test_a_step_with_a_file_that_nobody_vouches_for_is_not_committed(tmp_path):
    """As when the file system shows a process the step's folder, which another one renamed, too late."""
    step = tmp_path / "8" / "model" / "ocdbt.process_1"
    step.mkdir(parents=True)
    (step / "manifest.ocdbt").write_text("x")
    files = file_digests(tmp_path, 8, 0, 2)
    record = {"step": 8, "holds": ["model"], "files": files, "content": {}, "data_position": {}}
    with pytest.raises(RunFailed, match="8: no process vouches for model/ocdbt.process_1/manifest.ocdbt; do all hosts"):
        commit(tmp_path, record)
    assert committed_steps(tmp_path) == []
    commit(tmp_path, record | {"files": files | file_digests(tmp_path, 8, 1, 2)})
    assert find_damaged(tmp_path, [8]) == ([], [])


def test_a_number_without_its_id_is_refused(tmp_path):
    folder = make_steps(tmp_path, 4)
    write_sealed(tmp_path / "run.json", {"number": 5})
    with pytest.raises(UserError, match="run.json: has no id; without it no checkpoint is known to be this run's"):
        damage(folder, 4)
