"""Differences between processes are named, with both values, in all of them; sums over a mesh's axes are right."""

import time

import jax
import numpy as np
import pytest

from k2jax.config import Config
from k2jax.errors import RunFailed, UserError
from k2jax.preflight import ranks
from k2jax.runs.mirror import run_folder


@pytest.fixture
def four(monkeypatch):
    """four(2, change): what this process gathers comes from four, of which number 2 is changed by `change`."""
    monkeypatch.setattr(ranks, "count", lambda: 4)
    monkeypatch.setattr(ranks, "barrier", lambda *_: None)

    def with_change(number, change):
        def gather(name, value):
            if name == "shared":
                return [value] * 4
            entries = [{**value, "host": f"h{i}"} for i in range(4)]
            if "facts" in value:
                entries = [entry | {"facts": dict(entry["facts"])} for entry in entries]
            change(entries[number])
            return entries

        monkeypatch.setattr(ranks, "gather", gather)

    return with_change


def problems(function, *args) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        function(*args)
    return caught.value.problems


def test_what_is_alike_passes(four, tmp_path):
    four(0, lambda entry: None)
    ranks.check_agreement(Config())
    ranks.check_storage(tmp_path, {"digest": "ab"}, 1000)


def test_every_difference_is_named_with_both_values(four):
    def change(entry):
        facts = entry["facts"]
        facts["config data.batch_sequences"] = 12
        facts["version of jax"], facts["code of k2jax (digest)"], facts["devices"] = "9.9", "0", "1 x cpu"
        facts["XLA_FLAGS"] = ["--xla_cpu_enable_fast_math=true"]
        entry["time"] = time.time() - 60

    four(2, change)
    found = problems(ranks.check_agreement, Config())
    assert len(found) == 6
    rule = "must be the same in all processes"
    size = Config().data.batch_sequences
    text = f"config data.batch_sequences: {rule}; {size} in processes 0 (h0), 1 (h1), 3 (h3); 12 in process 2 (h2)"
    assert found[0] == text and found[1].startswith(f"version of jax: {rule}; '{jax.__version__}' in processes 0")
    assert "'1 x cpu' in process 2 (h2)" in found[3] and found[4].startswith("XLA_FLAGS: ")
    assert found[5].startswith("clock of process 2 (h2): -60 s from")


def test_a_second_store_or_a_disk_that_takes_nothing(four, tmp_path):
    four(3, lambda entry: entry.update(digests={"store": "cd"}))
    assert "'ab' in processes 0 (h0), 1 (h1), 2 (h2); 'cd' in process 3 (h3)" in problems(
        ranks.check_storage, tmp_path, {"store": "ab"}, 1
    )[0]
    four(1, lambda entry: entry.update(problem="cannot be written: Read-only file system"))
    (found,) = problems(ranks.check_storage, tmp_path, {}, 1)
    assert found.endswith("process 1 (h1): cannot be written: Read-only file system; it must be one directory that all processes share")
    four(1, lambda entry: entry.update(free=10))
    (found,) = problems(ranks.check_storage, tmp_path, {}, 1000)
    assert found.endswith("process 1 (h1): 10 bytes are free, a checkpoint takes 1,000; make room, or give another")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written(tmp_path):
    with ranks._written(tmp_path) as (name, problem):
        assert [path.name for path in tmp_path.iterdir()] == [name] and problem is None
    with ranks._written(tmp_path / "none") as found:
        assert found == (None, "cannot be written: No such file or directory") and [*tmp_path.iterdir()] == []


def test_a_bucket_that_all_can_write(four, tmp_path, s3):
    (tmp_path / "bucket").mkdir()
    folder = run_folder("s3://bucket/run").path
    four(0, lambda entry: None)
    ranks.check_storage(folder, {}, 10**18)
    written = [key for method, _, key, *_ in s3 if method == "PUT"]
    assert len(written) == 1 and written[0].startswith("run/.write-test-")
    assert s3[-1][0] == "DELETE" and not [p for p in tmp_path.rglob("*") if p.is_file()]
    four(1, lambda entry: entry.update(problem="s3://bucket/run/x: PERMISSION_DENIED"))
    (found,) = problems(ranks.check_storage, folder, {}, 1)
    assert found.startswith("train.run_dir = 's3://bucket/run', process 1 (h1): s3://bucket/run/x: PERMISSION_DENIED; ")
    private = run_folder("s3://private/run").path
    with ranks._written(private) as (name, problem):
        assert name is None and "AccessDenied" in problem


def test_sums_over_every_axis(mesh_of, monkeypatch):
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        assert ranks.check_axes(mesh).startswith("sums over the mesh's axes: fsdp 2: ")
        sound = ranks._sum_over
        monkeypatch.setattr(ranks, "_sum_over", lambda values, mesh, axis: sound(values, mesh, axis) + (axis == "expert"))
        with pytest.raises(RunFailed, match="a sum over mesh.expert is wrong on .*0"):
            ranks.check_axes(mesh)


def test_the_code_has_a_digest(monkeypatch, tmp_path):
    before = ranks.code_digest()
    assert len(before) == 16 and int(before, 16) >= 0
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(ranks.k2jax, "__file__", str(tmp_path / "__init__.py"))
    assert ranks.code_digest() != before and np.uint64(int(ranks.code_digest(), 16)) > 0
