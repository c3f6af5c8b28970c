"""A run that was stopped or killed, however often, ends in the same bits as one that was not."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import many
import micro
import numpy as np
import pytest

from k2jax.runs.folder import read_config
from k2jax.runs.records import read_records
from k2jax.sharding.mesh import single_device_mesh
from k2jax.train.checkpoint import restore_state
from k2jax.train.metrics import WALL_CLOCK
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a token store, and a cache that spares every later process the compilation."""
    folder = tmp_path_factory.mktemp("runs")
    micro.make_store(folder)
    return folder


def train(place: Path, moment: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = many.ENVIRONMENT | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        HERE / "crash_driver.py",
        moment,
        "train",
        HERE / "micro.py",
        "--simulate",
        "1",
        *arguments,
    ]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def state(run: Path, step: int) -> dict:
    """Every array of a checkpoint as NumPy, by its path."""
    config, mesh = read_config(run), single_device_mesh()
    stored = restore_state(run / "checkpoints", step, abstract_state(config, make_optimizer(config, mesh), mesh))
    leaves, _ = jax.tree_util.tree_flatten_with_path(stored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def records(run: Path) -> list[dict]:
    found = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


def assert_same_run(run: Path, reference: Path) -> None:
    assert records(run) == records(reference)
    mine, theirs = state(run, 20), state(reference, 20)
    assert mine.keys() == theirs.keys() and len(mine) > 40
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype and mine[name].tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module")
def reference(place) -> tuple[Path, int]:
    """An undisturbed run, and the number of its file operations."""
    done = train(place, "count")
    assert done.returncode == 0, done.stderr
    (place / "run").rename(place / "reference")
    assert [r["step"] for r in records(place / "reference")] == list(range(20))
    assert any(r["heads_clipped"] for r in records(place / "reference"))
    return place / "reference", int(done.stdout.split("file operations: ")[1])


@pytest.fixture(autouse=True)
def cleared(place):
    """A test that fails leaves the next one no run of its own."""
    yield
    shutil.rmtree(place / "run", ignore_errors=True)


def test_sigterm_finishes_the_step_saves_and_says_how_to_resume(place, reference):
    stopped = train(place, "term:9")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    step = records(place / "run")[-1]["step"] + 1
    assert step in (10, 11)  # the record of step 9 is written while step 10 runs
    assert f"stopped after step {step}, saved. Resume with:\n  k2jax train" in stopped.stdout
    assert (place / "run" / "checkpoints" / f"{step}.json").exists()
    assert train(place, "count").returncode == 0
    assert_same_run(place / "run", reference[0])


@pytest.mark.parametrize("num_seeded", [1, pytest.param(20, marks=pytest.mark.grid)])
def test_sigkill_at_many_moments(place, reference, num_seeded):
    """One run, killed again and again: before its first save, in saves, inside a record, at seeded file operations."""
    folder, operations = reference
    draw = random.Random(7)
    moments = ["file:12", "metrics:9"] if num_seeded == 1 else ["file:1", "file:12", "metrics:2", "file:40", "metrics:9"]
    moments += [f"file:{draw.randrange(20, operations // 2)}" for _ in range(num_seeded)]
    for moment in moments:
        killed = train(place, moment)
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stdout, killed.stderr)
    finished = train(place, "count")
    assert finished.returncode == 0, finished.stderr
    assert_same_run(place / "run", folder)
    again = train(place, "count")
    assert again.returncode == 0 and "done: step 20" in again.stdout, again.stderr
    assert_same_run(place / "run", folder)


def test_a_changed_config_is_refused_with_all_differences(place, reference):
    (place / "reference").rename(place / "run")
    try:
        refused = train(place, "count", "--optim.learning-rate", "0.01", "--data.seed", "3", "--train.num-steps", "3")
    finally:
        (place / "run").rename(place / "reference")
    assert refused.returncode == 2
    assert refused.stderr == (
        "k2jax train: 3 problems\n"
        "  optim.learning_rate: the run in run has 0.02, now given 0.01; "
        "this may not change within a run; restore it, or continue from the weights alone in a new run: "
        "--train.run-dir NEW --train.init-from run\n"
        "  data.seed: the run in run has 0, now given 3; "
        "this may not change within a run; restore it, or continue from the weights alone in a new run: "
        "--train.run-dir NEW --train.init-from run\n"
        "  train.num_steps = 3: the run in run has done 20 steps; give at least as many, or another train.run_dir\n"
    )
