"""The names in a run directory: as the README lists them, and said in one place."""

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from k2jax.runs.folder import RunFolder

README = Path(__file__).parents[2] / "README.md"


def test_every_path_is_inside_and_named_in_the_readme():
    members = {name: getattr(RunFolder(Path("a/run")), name) for name in vars(RunFolder) if not name.startswith("_")}
    assert len(members) == 16 and {path.parent for path in members.values()} == {Path("a/run")}
    listed = {name.strip("/").split("/")[0] for name in re.findall(r"`([\w./]+)`", README.read_text())}
    assert {"config.json", "timeline.json", "metrics.jsonl", "ledger.jsonl", "tb", "checkpoints"} <= {
        path.name for path in members.values()
    } & listed
    with pytest.raises(FrozenInstanceError):
        RunFolder(Path("a")).path = Path("b")
