"""The command on eight simulated devices and on one: the same losses."""

import functools
import subprocess
import sys
from pathlib import Path

import many
import micro
import pytest

MICRO = Path(__file__).parent / "micro.py"
pytestmark = pytest.mark.slow
LAYERS = "--model.num-hidden-layers", "3"  # a dense one and a stage of each MoE layer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    micro.make_store(folder)
    return folder


def records(place: Path, name: str, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "k2jax", "train", MICRO, "--train.run-dir", name, *LAYERS, *arguments]
    done = subprocess.run(command, cwd=place, env=many.ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return many.records(place / name)


@functools.cache
def one_device(place: Path, ns_dtype: str) -> list[dict]:
    """The reference of both tests."""
    return records(place, f"one-{ns_dtype}", "--simulate", "1", "--optim.ns-dtype", ns_dtype)


@pytest.mark.parametrize(
    "ns_dtype, bound", [("float32", 1e-5), pytest.param("bfloat16", 1e-2, marks=pytest.mark.grid)]
)
def test_eight_devices_train_as_one(place, ns_dtype, bound):
    """All 20 losses, from the same seed. bf16 Newton-Schulz amplifies the rounding of the gradients' sums."""
    cut = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    begun = records(place, f"eight-{ns_dtype}", "--simulate", "8", "--optim.ns-dtype", ns_dtype, *cut)
    one, eight = ([record["loss"] for record in run] for run in (one_device(place, ns_dtype), begun))
    assert len(one) == len(eight) == 20 and one[-1] < 0.7 * one[0]
    assert abs(eight[0] / one[0] - 1) <= 1e-5
    assert max(abs(a / b - 1) for a, b in zip(eight, one, strict=True)) <= bound


@pytest.mark.grid
def test_stages_train_as_one_device_and_others_go_on(place):
    """All 20 losses and three validations: nine steps by pipeline stages, the rest on a mesh without any."""
    exact = ("--optim.ns-dtype", "float32")
    stages = ("--mesh.stage", "2", "--mesh.fsdp", "2", "--mesh.expert", "2", "--train.self-check", "on")
    one = one_device(place, "float32")
    begun = records(place, "stages", "--simulate", "8", *exact, *stages, "--train.num-steps", "9")
    got = records(place, "stages", "--simulate", "4", *exact, "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert len(begun) == 9 and got[:9] == begun and len(got) == len(one) == 20
    assert one[-1]["loss"] < 0.7 * one[0]["loss"]
    for key, count in (("loss", 20), ("validation_bits_per_byte", 3)):
        pairs = [(a[key], b[key]) for a, b in zip(got, one, strict=True) if key in a and key in b]
        assert len(pairs) == count and max(abs(a / b - 1) for a, b in pairs) <= 1e-5, pairs
