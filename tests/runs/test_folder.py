"""The names in a run directory: as the README lists them, and said in one place."""

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from k2jax.config import Config
from k2jax.errors import RunFailed
from k2jax.runs.commits import commit
from k2jax.runs.folder import RunFolder, check_held, lock_run, write_config
from k2jax.runs.identity import make_identity

README = Path(__file__).parents[2] / "README.md"


def test_every_path_is_inside_and_named_in_the_readme():
    members = {name: getattr(RunFolder(Path("a/run")), name) for name in vars(RunFolder) if not name.startswith("_")}
    assert len(members) == 18 and {path.parent for path in members.values()} == {Path("a/run")}
    listed = {name.strip("/").split("/")[0] for name in re.findall(r"`([\w./]+)`", README.read_text())}
    assert {"config.json", "timeline.json", "metrics.jsonl", "ledger.jsonl", "tb", "checkpoints"} <= {
        path.name for path in members.values()
    } & listed
    with pytest.raises(FrozenInstanceError):
        RunFolder(Path("a")).path = Path("b")


def test_a_holder_that_was_replaced_writes_nothing_more(tmp_path):
    """As after a person removed the lock of a trainer that seemed dead, or on a file system without locks."""
    with lock_run(tmp_path):
        check_held(tmp_path)
        (tmp_path / "lock").unlink()
        with pytest.raises(RunFailed, match="lock: is missing; the run may belong to another process by now"):
            check_held(tmp_path)
        (tmp_path / "lock").write_text("7 on elsewhere\n0123\n")
        with pytest.raises(RunFailed, match="taken over by process 7 on elsewhere; this one writes nothing more"):
            check_held(tmp_path)
        (tmp_path / "checkpoints" / "4").mkdir(parents=True)
        write_config(tmp_path, Config())
        make_identity(tmp_path)
        with pytest.raises(RunFailed, match="taken over"):
            commit(tmp_path / "checkpoints", {"step": 4, "holds": [], "files": {}, "content": {}, "data_position": {}})
        assert not (tmp_path / "checkpoints" / "4.json").exists()
    check_held(tmp_path)  # one that holds nothing commits what it likes: an import, say
