"""A test for CI: a mesh of eight simulated devices has the losses of one device. Run it: pytest docs/test_mesh.py

Every training is a process of its own, since the number of devices is settled once in a process.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from k2jax.runs.records import read_records

CONFIG = Path(__file__).parents[1] / "tests/train/micro.py"  # yours: a model as small, with the features that you use
MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}]


def k2jax(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "k2jax", *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    folder, text = tmp_path_factory.mktemp("data") / "email", Path(sysconfig.get_path("stdlib")) / "email"
    k2jax("prepare", text, "--pattern", "*.py", "--tokenizer", "byte", "--validation-fraction", 0.2, "--out", folder)
    return folder


def losses(store: Path, run: Path, **mesh: int) -> list[float]:
    """Of three steps; on one device without a mesh."""
    sizes = [text for axis, size in mesh.items() for text in (f"--mesh.{axis}", size)]
    options = ("--data.path", store, "--train.run-dir", run, "--train.num-steps", 3, *sizes)
    k2jax("train", CONFIG, "--simulate", 8 if mesh else 1, *options)
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="session")
def expected(store, tmp_path_factory) -> list[float]:
    return losses(store, tmp_path_factory.mktemp("runs") / "one")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_has_the_losses_of_one_device(store, expected, tmp_path, mesh):
    assert len(expected) == 3
    assert losses(store, tmp_path / "mesh", **mesh) == pytest.approx(expected, rel=1e-3)
