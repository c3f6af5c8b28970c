"""A step exists when its commit record does; what is restored is what was saved, on any mesh."""



import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from k2jax.cli.main import main
from k2jax.config import CheckpointConfig, Config
from k2jax.errors import RunFailed, UserError
from k2jax.runs.commits import committed_steps, find_damaged, newest_step, read_record, remove_leftovers, set_aside
from k2jax.runs.folder import write_config
from k2jax.runs.identity import make_identity
from k2jax.train.checkpoint import Saver, restore_state
from k2jax.train.guard import Guard
from k2jax.train.restore import damaged_arrays
from k2jax.train.state import TrainState


def make_state(mesh, step: int = 0) -> TrainState:
    def put(array, *spec):
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))

    values = np.random.default_rng(step).standard_normal((4, 8, 16)).astype(np.float32)
    return TrainState(
        step=put(np.int32(step)),
        params={"w": put(values, None, "fsdp", "tensor"), "b": put(values[0, 0])},
        router_bias={"bias": put(values[0, :4], "expert")},
        opt_state=({"m": put(values.astype(jnp.bfloat16), "expert")}, put(np.int32(step)), optax.EmptyState()),
        guard=Guard(*map(put, (np.int32(2), np.int32(step), values[0, 0], values[0, 1]))),
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a: TrainState, b: TrainState) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_to_another_mesh(tmp_path, mesh_of):
    state = make_state(mesh_of(fsdp=2, expert=2, tensor=2), step=3)
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(3, state, {"next_row": 12})
    saver.wait()
    assert newest_step(tmp_path) == 3
    assert read_record(tmp_path, 3)["data_position"] == {"next_row": 12}
    for mesh in (mesh_of(fsdp=2, expert=2, tensor=2), mesh_of(fsdp=8), mesh_of(expert=4), mesh_of()):
        template = abstract(make_state(mesh))
        restored = restore_state(tmp_path, 3, template)
        assert_equal(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, template)


def test_a_linked_folder_of_steps_belongs_to_the_run_with_the_link(tmp_path, mesh_of):
    run, disk = tmp_path / "run", tmp_path / "disk" / "steps"
    run.mkdir()
    disk.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    write_config(run, Config())
    make_identity(run)
    saver = Saver(run / "checkpoints", CheckpointConfig())
    saver.save(3, make_state(mesh_of()), {})
    saver.wait()
    assert find_damaged(run / "checkpoints", [3]) == ([], []) and read_record(run / "checkpoints", 3)["run"]["id"]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path, mesh_of):
    saver = Saver(tmp_path, CheckpointConfig(keep_last=2))
    for step in (0, 4, 8, 12):
        saver.save(step, make_state(mesh_of(), step), {})
    saver.wait()
    assert committed_steps(tmp_path) == [8, 12] and sorted(p.name for p in tmp_path.iterdir()) == [
        "12",
        "12.json",
        "8",
        "8.json",
    ]
    (tmp_path / "12.json").unlink()  # as if killed between Orbax's end and ours
    (tmp_path / "16.orbax-checkpoint-tmp").mkdir()
    assert newest_step(tmp_path) == 8
    assert remove_leftovers(tmp_path) == ["12", "16.orbax-checkpoint-tmp"]
    assert_equal(restore_state(tmp_path, 8, abstract(make_state(mesh_of()))), make_state(mesh_of(), 8))


def test_every_so_many_steps_one_is_kept_for_good(tmp_path, mesh_of):
    saver = Saver(tmp_path, CheckpointConfig(keep_last=1, keep_every=8))
    for step in (0, 4, 8, 12, 16, 20):
        saver.save(step, make_state(mesh_of(), step), {})
    saver.wait()
    assert committed_steps(tmp_path) == [0, 8, 16, 20]


def test_saved_steps_without_a_record_stop_the_run(tmp_path, mesh_of):
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(4, make_state(mesh_of()), {})
    saver.wait()
    (tmp_path / "4.json").unlink()
    with pytest.raises(UserError, match="holds 4 but no commit record"):
        newest_step(tmp_path)
    (tmp_path / "4").rename(tmp_path / "0")  # killed inside the very first save: nothing to lose
    assert newest_step(tmp_path) is None


def test_a_save_that_fails_is_raised_and_leaves_no_record(tmp_path, mesh_of, monkeypatch):
    saver = Saver(tmp_path, CheckpointConfig())
    monkeypatch.setattr(
        "k2jax.runs.commits.write_sealed", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    saver.save(0, make_state(mesh_of()), {})
    with pytest.raises(RunFailed, match="could not be saved: .*No space left"):
        saver.wait()
    assert committed_steps(tmp_path) == []


def test_a_state_may_be_donated_once_save_returns(tmp_path, mesh_of):
    state = make_state(mesh_of(fsdp=2), step=7)
    expected = jax.tree.map(np.array, state)
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(7, state, {})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    saver.wait()
    assert_equal(restore_state(tmp_path, 7, abstract(make_state(mesh_of()))), expected)


def flip_a_bit(step_folder) -> None:
    """In the middle of the largest file, which holds arrays."""
    largest = max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_damaged_steps_are_set_aside_and_the_one_before_is_used(tmp_path, mesh_of):
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig())
    for step in (0, 4, 8):
        saver.save(step, make_state(mesh_of(), step), {})
    saver.wait()
    flip_a_bit(folder / "8")
    steps, problems = find_damaged(folder, committed_steps(folder))
    set_aside(folder, steps, problems)
    assert steps == [8] and len(problems) == 1 and "is not what was written (sha256)" in problems[0]
    assert committed_steps(folder) == [0, 4] and sorted(p.name for p in (tmp_path / "damaged").iterdir()) == [
        "8",
        "8.json",
    ]
    assert find_damaged(folder, committed_steps(folder)) == ([], [])
    (folder / "4" / "commit_success.txt").unlink()
    flip_a_bit(folder / "0")
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        find_damaged(folder, committed_steps(folder))
    assert committed_steps(folder) == [0, 4]


def test_damaged_arrays_are_named(tmp_path, mesh_of, capsys):
    """Each of 30 flips in the files of the arrays is found in its file; those in an array's bits name the array."""
    run, rng, named = tmp_path / "run", np.random.default_rng(3), set()
    run.mkdir()
    write_config(run, Config())
    make_identity(run)
    saver = Saver(run / "checkpoints", CheckpointConfig())
    saver.save(4, make_state(mesh_of(fsdp=2, expert=2, tensor=2), 4), {})
    saver.wait()
    assert main(["verify", str(run)]) == 0 and capsys.readouterr().out == "step 4: sound\n"
    assert damaged_arrays(run / "checkpoints", 4) == []
    files = sorted(p for p in (run / "checkpoints/4").rglob("*") if p.is_file() and p.stat().st_size > 2000)
    for _ in range(30):
        path = files[rng.integers(len(files))]
        sound = path.read_bytes()
        changed = bytearray(sound)
        changed[rng.integers(len(sound))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert main(["verify", str(run), "--step", "4"]) == 1
        out, err = capsys.readouterr()
        assert f"step 4: DAMAGED\n  {path}: is not what was written (sha256)" in out and "1 of 1 committed steps" in err
        named |= {line.split(":")[0].split("[")[0].strip() for line in out.splitlines()[2:] if "no array" not in line}
        path.write_bytes(sound)
    assert "model.params.w" in named and named <= {*read_record(run / "checkpoints", 4)["content"]}
    assert main(["verify", str(run), "--step", "5"]) == 2
    assert "--step 5: is not a committed step; there are 4" in capsys.readouterr().err
