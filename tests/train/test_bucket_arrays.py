"""Arrays in a bucket are those that were saved, on any mesh, and what was flipped in them is named."""

import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore
from test_checkpoint import abstract, assert_equal, make_state

from k2jax.cli.main import main
from k2jax.config import CheckpointConfig, Config
from k2jax.errors import RunFailed
from k2jax.runs import mirror
from k2jax.runs.commits import committed_steps, damage, read_record, remove_step
from k2jax.runs.folder import write_config
from k2jax.runs.identity import make_identity
from k2jax.runs.mirror import hold_run, join_run, open_run_folder
from k2jax.train import checkpoint
from k2jax.train.bucket_arrays import chunk_shape
from k2jax.train.checkpoint import Saver, restore_state
from k2jax.train.restore import damaged_arrays


@pytest.fixture(params=["s3", "gs"])
def files(request, tmp_path):
    """A run that this process holds."""
    request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])
    (tmp_path / "bucket").mkdir()
    files = open_run_folder(f"{request.param}://bucket/run")
    with hold_run(files.path) as writer:
        write_config(files.path, Config())
        make_identity(files.path)
        join_run(files.path, writer)
        write_config(files.path, Config())
        make_identity(files.path)
        yield files


def save(files, step, state, **options):
    saver = Saver(files.checkpoints, CheckpointConfig(**options))
    saver.save(step, state, {"next_row": step})
    saver.wait()
    return saver


def test_round_trip_to_another_mesh(files, mesh_of, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 256)
    state = make_state(mesh_of(fsdp=2, expert=2, tensor=2), step=3)
    expected = jax.tree.map(np.array, state)
    saver = Saver(files.checkpoints, CheckpointConfig())
    saver.save(3, state, {"next_row": 12})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    saver.wait()
    record = read_record(files.checkpoints, 3)
    assert record["data_position"] == {"next_row": 12} and len(record["files"]) > 30
    for mesh in (mesh_of(fsdp=2, expert=2, tensor=2), mesh_of(fsdp=8), mesh_of(expert=4), mesh_of()):
        template = abstract(make_state(mesh))
        restored = restore_state(files.checkpoints, 3, template)
        assert_equal(restored, expected)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, template)


def test_the_objects_are_zarr_of_another_reader(files, mesh_of, tmp_path):
    """By TensorStore from the server's disk, whose files are copies of the objects; and their sizes add up to the state."""
    state = make_state(mesh_of(fsdp=2, tensor=2), step=1)
    save(files, 1, state)
    (root,) = (tmp_path / "bucket/run/arrays").iterdir()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/model/params.w/"}}
    stored = tensorstore.open(spec, open=True, read=True).result()
    np.testing.assert_array_equal(stored.read().result(), np.asarray(state.params["w"]))
    sizes = [p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert sum(sizes) == sum(x.nbytes for x in jax.tree.leaves(state))  # once each


@pytest.mark.parametrize("most, chunk", [(10**6, (6, 4, 10)), (959, (3, 4, 10)), (200, (1, 4, 10)), (159, (1, 2, 10)), (4, (1, 1, 1))])
def test_chunks_divide_what_they_cut_and_are_as_large_as_may_be(most, chunk):
    assert chunk_shape((6, 4, 10), 4, most) == chunk and chunk_shape((), 4, most) == ()


def test_flipped_bits_are_found_and_named(files, mesh_of, tmp_path, capsys):
    url = mirror.shown(files.path)
    for step in (1, 2):
        save(files, step, make_state(mesh_of(fsdp=2), step))
    assert main(["verify", url]) == 0 and capsys.readouterr().out == "step 1: sound\nstep 2: sound\n"
    (root,) = (tmp_path / "bucket/run/arrays").glob("2-*")
    path = root / "model/params.w/c/0/1/0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    assert main(["verify", url]) == 1
    said = capsys.readouterr().out
    assert f"step 2: DAMAGED\n  {url}/arrays/{root.name}/model/params.w/c/0/1/0: is not what was written (sha256)" in said
    assert "model.params.w: is not what was saved" in said and damaged_arrays(files.checkpoints, 1) == []
    with pytest.raises(RunFailed, match="model.params.w: is not what was saved"):
        restore_state(files.checkpoints, 2, abstract(make_state(mesh_of(fsdp=4))))
    path.unlink()  # a lost chunk does not read as zeros
    with pytest.raises(RunFailed, match="model.params.w: "):
        restore_state(files.checkpoints, 2, abstract(make_state(mesh_of(fsdp=4))))


def test_only_the_newest_are_kept(files, mesh_of, tmp_path):
    for step in (0, 4, 8):
        save(files, step, make_state(mesh_of(), step), keep_last=2)
    assert committed_steps(files.checkpoints) == [4, 8]
    left = {p.relative_to(tmp_path / "bucket/run/arrays").parts[0] for p in (tmp_path / "bucket/run/arrays").rglob("zarr.json")}
    assert {name.split("-")[0] for name in left} == {"4", "8"}


def test_a_step_that_another_has_committed_stays_his(files, mesh_of, tmp_path):
    (tmp_path / "bucket/run/checkpoints").mkdir()
    record = tmp_path / "bucket/run/checkpoints/4.json"
    record.write_text(json.dumps({"writer": {"pid": 7, "host": "there"}}))
    saver = Saver(files.checkpoints, CheckpointConfig())
    saver.save(4, make_state(mesh_of()), {})
    with pytest.raises(RunFailed, match="checkpoints/4.json: process 7 on there has committed this step"):
        saver.wait()
    assert json.loads(record.read_text()) == {"writer": {"pid": 7, "host": "there"}}


def test_copies_to_a_disk_and_to_a_bucket_are_runs(files, mesh_of, tmp_path):
    state, template = make_state(mesh_of(fsdp=2), 5), abstract(make_state(mesh_of(expert=2)))
    save(files, 4, make_state(mesh_of(), 4)), save(files, 5, state)
    shutil.copytree(tmp_path / "bucket/run", tmp_path / "copy")
    copy = tmp_path / "copy/checkpoints"
    assert_equal(restore_state(copy, 5, template), state)
    assert damage(copy, 5) == []
    remove_step(copy, 4)
    assert [*copy.iterdir()] == [copy / "5.json"] and len([*(tmp_path / "copy/arrays").iterdir()]) == 1
    saver = Saver(copy, CheckpointConfig())
    saver.save(6, state, {})
    saver.wait()
    shutil.copytree(tmp_path / "copy", tmp_path / "bucket/back")
    back = open_run_folder(mirror.shown(files.path).replace("run", "back")).checkpoints
    assert committed_steps(back) == [5, 6]
    for step in (5, 6):  # the second by Orbax
        assert_equal(restore_state(back, step, template), state)
        assert damage(back, step) == []
    remove_step(back, 6)
    assert committed_steps(back) == [5] and not [*(tmp_path / "bucket/back/checkpoints/6").rglob("manifest.ocdbt")]
