"""The command on eight simulated devices and on one: the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2jax.data.prepare import prepare

MICRO = Path(__file__).parent / "micro.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    source = Path(os.__file__).parent / "json"
    prepare(str(source), str(folder / "store"), "byte", pattern="*.py", validation_fraction=0.5)
    return folder


def losses(place: Path, name: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-m", "k2jax", "train", MICRO, "--train.run-dir", name, *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (place / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ns_dtype, bound", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_eight_devices_train_as_one(place, ns_dtype, bound):
    """All 20 losses, from the same seed. bf16 Newton-Schulz amplifies the rounding of the gradients' sums."""
    cut = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    one = losses(place, f"one-{ns_dtype}", "--simulate", "1", "--optim.ns-dtype", ns_dtype)
    eight = losses(place, f"eight-{ns_dtype}", "--simulate", "8", "--optim.ns-dtype", ns_dtype, *cut)
    assert len(one) == len(eight) == 20 and one[-1] < 0.7 * one[0]
    assert abs(eight[0] / one[0] - 1) <= 1e-5
    assert max(abs(a / b - 1) for a, b in zip(eight, one, strict=True)) <= bound
