"""The same preparation in this process, on two of datatrove's workers, on a Slurm that is played, and on Ray."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import k2jax
from k2jax.data.text.prepare import prepare
from k2jax.errors import UserError

OPTIONS = ("--tokenizer", "train:300", "--validation-fraction", "0.3", "--near-duplicates", "0.8")


@pytest.fixture
def source(tmp_path):
    """Nine files, a tenth of a megabyte in all."""
    (tmp_path / "in").mkdir()
    for number in range(9):
        path = tmp_path / f"in/{number}.jsonl"
        texts = [f"text {number * (i % 7)} {i} " + "word " * i for i in range(30)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "in"


CODE = """
import functools, sys
from k2jax.data.text import prepare
from k2jax.cli.main import main
prepare.prepare = functools.partial(prepare.prepare, rank_bytes=6000)
if __name__ == "__main__":
    sys.exit(main())
"""


def start(tmp_path, source, name, *options, path=None):
    """`k2jax prepare` in a process of its own, with small ranks."""
    (tmp_path / "small_ranks.py").write_text(CODE)
    places = [str(Path(k2jax.__file__).parents[1]), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "RAY_AUTH_MODE": "disabled",
                   "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    if path:
        environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    command = [
        sys.executable,
        str(tmp_path / "small_ranks.py"),
        "prepare",
        f"s={source}",
        "--out",
        str(tmp_path / name),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *OPTIONS, *options], env=environment, stdout=pipe, stderr=pipe, text=True)


def run(*args, **options):
    child = start(*args, **options)
    out, error = child.communicate(timeout=240)
    return subprocess.CompletedProcess(child.args, child.returncode, out, error)


def manifest(tmp_path, name):
    return (tmp_path / name / "manifest.json").read_bytes()


def test_two_workers_give_the_same_store(tmp_path, source):
    alone = run(tmp_path, source, "one")
    two = run(tmp_path, source, "two", "--workers", "2")
    assert (alone.returncode, two.returncode, two.stderr) == (0, 0, "")
    assert manifest(tmp_path, "one") == manifest(tmp_path, "two")
    assert json.loads(manifest(tmp_path, "one"))["skipped"]["duplicate"]["count"] > 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "one", "small_ranks.py", "two"]


def processes_with(marker):
    """Of all processes that this user may look into, those with `marker` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.grid
def test_a_killed_one_takes_its_workers_along_and_resumes(tmp_path, source, monkeypatch):
    """SIGKILL of the first process alone, once its workers have results."""
    run(tmp_path, source, "one")
    marker = f"K2JAX_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*marker.split("="))
    child, deadline = start(tmp_path, source, "two", "--workers", "2"), time.monotonic() + 60
    while not [*tmp_path.glob(".two.k2jax-partial/read/0000?")] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(processes_with(marker)) > 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 60
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes_with(marker)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == [] and not (tmp_path / "two").exists()
    child.communicate()
    assert run(tmp_path, source, "two", "--workers", "2").returncode == 0
    assert manifest(tmp_path, "one") == manifest(tmp_path, "two")


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
exported = dict(pair.split("=") for a in sys.argv if a.startswith("--export=") for pair in a[9:].split(",")[1:])
open("{log}", "a").write(script)
for number in range(first, last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), SLURM_NODELIST="node1", **exported)
    subprocess.run(["bash", "-c", script.replace("source {activate}", "")], env=environment, capture_output=True)
print("Submitted batch job 77")
"""


@pytest.fixture
def slurm(tmp_path):
    """sbatch runs an array's scripts before it returns, srun its command; scontrol names one node, squeue no job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    activate = Path(sys.prefix) / "bin/activate"
    sbatch = SBATCH.format(python=sys.executable, log=tmp_path / "scripts", activate=activate)
    launch = f'#!/bin/sh\nexec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"\n'
    srun = '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'
    scripts = {"sbatch": sbatch, "srun": srun, "squeue": "#!/bin/sh\n", "launch_pickled_pipeline": launch,
               "scontrol": "#!/bin/sh\necho node1\n"}  # fmt: skip
    for name, content in scripts.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.grid
def test_slurm(tmp_path, source, slurm):
    run(tmp_path, source, "one")
    choice = ("--executor", "slurm", "--workers", "3", "--executor-option", "partition=cpu", "--executor-option")
    done = run(tmp_path, source, "two", *choice, "time=1:00:00", path=slurm)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path, "one") == manifest(tmp_path, "two")
    scripts = (tmp_path / "scripts").read_text()
    assert scripts.count("#SBATCH --partition=cpu") == scripts.count("#SBATCH --time=1:00:00") == 6  # one per task
    assert "#SBATCH --job-name=k2jax-read" in scripts and "%3" in scripts
    assert f"source {sys.prefix}/bin/activate" in scripts


def test_a_task_that_fails_says_why_and_can_be_tried_again(tmp_path, source, slurm):
    run(tmp_path, source, "one")
    (slurm / "srun").rename(slurm / "kept")
    (slurm / "srun").write_text("#!/bin/sh\nexit 1\n")
    (slurm / "srun").chmod(0o755)
    choice = ("--executor", "slurm", "--executor-option", "partition=cpu", "--executor-option", "time=1:00:00")
    done = run(tmp_path, source, "two", *choice, path=slurm)
    assert done.returncode == 1 and "task read: 3 ranks have no result, first 0: no rank says why" in done.stderr
    (slurm / "kept").rename(slurm / "srun")
    assert run(tmp_path, source, "two", *choice, path=slurm).returncode == 0
    assert manifest(tmp_path, "one") == manifest(tmp_path, "two")


def test_every_bad_line_of_all_ranks_is_named(tmp_path, source):
    for number in (1, 8):
        with open(source / f"{number}.jsonl", "a") as file:
            file.write("{\n")
    done = run(tmp_path, source, "one", "--workers", "2")
    assert done.returncode == 2 and done.stderr.count("is not JSON") == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / ".one.k2jax-partial").exists()


def test_wrong_executors_are_refused(tmp_path, source, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        prepare(str(source), str(tmp_path / "out"), "byte", executor="slurm", executor_options={"partitoin": "x"})
    problems = error.value.problems
    assert problems[0] == "executor = 'slurm': sbatch is not on the PATH; start it on a machine that submits jobs"
    assert problems[1].startswith("executor_options 'partitoin': slurm has condaenv, cpus_per_task, ")
    assert problems[2:] == (
        "executor_options: slurm needs 'partition', such as partition=cpu",
        "executor_options: slurm needs 'time', such as time=20:00:00",
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(UserError, match="executor = 'ray': needs Ray; pip install 'k2jax\\[ray\\]'"):
        prepare(str(source), str(tmp_path / "out"), "byte", executor="ray")


@pytest.mark.data
def test_ray(tmp_path, source):
    """A cluster of this machine alone, which Ray starts and ends with the process."""
    run(tmp_path, source, "one")
    options = ("--executor-option", "mem_per_cpu_gb=0.5")
    done = run(tmp_path, source, "two", "--executor", "ray", "--workers", "2", *options)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path, "one") == manifest(tmp_path, "two")
