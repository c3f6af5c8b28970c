"""`k2jax launch local -- train`: real training in two processes under the launcher, stopped, resumed, and killed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import micro
import pytest
from compile_flags import COMPILE_FLAGS

pytestmark = pytest.mark.grid
ROOT = Path(__file__).parents[2]
TRAIN = ("--train.run-dir", "run", "--train.self-check", "off", "--train.num-steps", "2000", "--mesh.fsdp", "2")
STEP = re.compile(r"\[0\] step (\d+)/2000 ")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    micro.make_store(folder)
    return folder


def launched(place: Path) -> subprocess.Popen:
    config = str(ROOT / "tests" / "train" / "micro.py")
    argv = [
        sys.executable,
        "-m",
        "k2jax",
        "launch",
        "local",
        "-n",
        "2",
        "--devices-per-process",
        "1",
        "--",
        "train",
        config,
        *TRAIN,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "XLA_FLAGS": COMPILE_FLAGS}
    return subprocess.Popen(argv, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_step(process: subprocess.Popen) -> int:
    """The first step that is shown."""
    for line in process.stdout:
        if found := STEP.match(line):
            return int(found[1])
    raise AssertionError(process.stderr.read())


def ranks(process: subprocess.Popen) -> list[int]:
    """The pids of the two trainers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"guardian" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_stopped_resumed_and_killed(place):
    with launched(place) as process:
        assert first_step(process) == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    resume = "Resume by what started the processes, each of which ran:\n\\[0\\]   k2jax train "
    [stopped] = re.findall(rf"\[0\] stopped after step (\d+), saved. {resume}", out)
    assert "failed" not in err

    with launched(place) as process:
        assert first_step(process) == int(stopped) + 1
        os.kill(ranks(process)[1], signal.SIGKILL)
        assert any("restore step" in line for line in process.stdout)  # by itself
        assert first_step(process) >= int(stopped) + 1
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert "k2jax launch: process 1 failed first, with exit code 137 (SIGKILL)" in err
    assert re.search(r"k2jax launch: exit code 137: step \d+ is committed; restart 1 of 3 without a newer one", err)
    assert not [line for line in out.splitlines() if not line.startswith(("[0] ", "[1] "))]
