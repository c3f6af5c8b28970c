"""The command on eight simulated devices and on one: the same losses."""

import json
import subprocess
import sys
from pathlib import Path

import micro
import pytest

MICRO = Path(__file__).parent / "micro.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    micro.make_store(folder)
    return folder


def records(place: Path, name: str, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "k2jax", "train", MICRO, "--train.run-dir", name, *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]


def losses(place: Path, name: str, *arguments: str) -> list[float]:
    return [record["loss"] for record in records(place, name, *arguments)]


@pytest.mark.parametrize(
    "ns_dtype, bound", [("float32", 1e-5), pytest.param("bfloat16", 1e-2, marks=pytest.mark.grid)]
)
def test_eight_devices_train_as_one(place, ns_dtype, bound):
    """All 20 losses, from the same seed. bf16 Newton-Schulz amplifies the rounding of the gradients' sums."""
    cut = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    one = losses(place, f"one-{ns_dtype}", "--simulate", "1", "--optim.ns-dtype", ns_dtype)
    eight = losses(place, f"eight-{ns_dtype}", "--simulate", "8", "--optim.ns-dtype", ns_dtype, *cut)
    assert len(one) == len(eight) == 20 and one[-1] < 0.7 * one[0]
    assert abs(eight[0] / one[0] - 1) <= 1e-5
    assert max(abs(a / b - 1) for a, b in zip(eight, one, strict=True)) <= bound


def test_stages_train_as_one_device_and_others_go_on(place):
    """All 20 losses and three validations: nine steps by pipeline stages, the rest on a mesh without any."""
    layers = ("--model.num-hidden-layers", "3", "--optim.ns-dtype", "float32")
    stages = ("--mesh.stage", "2", "--mesh.fsdp", "2", "--mesh.expert", "2", "--train.self-check", "on")
    one = records(place, "one", "--simulate", "1", *layers)
    begun = records(place, "stages", "--simulate", "8", *layers, *stages, "--train.num-steps", "9")
    got = records(place, "stages", "--simulate", "4", *layers, "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert len(begun) == 9 and got[:9] == begun and len(got) == len(one) == 20
    assert one[-1]["loss"] < 0.7 * one[0]["loss"]
    for key, count in (("loss", 20), ("validation_bits_per_byte", 3)):
        pairs = [(a[key], b[key]) for a, b in zip(got, one, strict=True) if key in a and key in b]
        assert len(pairs) == count and max(abs(a / b - 1) for a, b in pairs) <= 1e-5, pairs
