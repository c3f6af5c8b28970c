"""`k2jax launch slurm`: bash runs the script, with a srun that starts processes and a scontrol that takes notes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from k2jax.errors import UserError
from k2jax.launch.manifest import Job
from k2jax.launch.slurm import slurm_script

HOSTILE = (
    "'",
    '"',
    "a b",
    "$HOME",
    "$(touch pwned)",
    "`touch pwned`",
    "line\n#SBATCH --nodes=99\ntouch pwned",
    "\\",
    "*",
    "é€𝄞",
    "",
    "--",
    "!",
)
SRUN = """#!{python}
import json, os, subprocess, sys
arguments = sys.argv[1:]
options = {{}}
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    options[name] = value
json.dump(options, open("srun.json", "w"))
environments = [os.environ | dict(SLURM_PROCID=str(i), SLURM_LOCALID="0") for i in range(int(options["--ntasks"]))]
processes = [subprocess.Popen(arguments, env=environment) for environment in environments]
sys.exit(max(process.wait() for process in processes))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo "$3" > nodelist; echo node07; echo node08 ;;
    "show job") echo "JobId=$4 JobState=$STATE Requeue=1" ;;
    *) echo "$@" >> requeued ;;
esac
"""
K2JAX = """#!{python}
import json, os, sys, time
index = os.environ["K2JAX_PROCESS_ID"]
json.dump([sys.argv[1:], dict(os.environ)], open(f"process-{{index}}.json", "w"))
open("pid", "w").write(str(os.getppid()))
time.sleep(float(os.environ.get("SECONDS_", "0")))
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Run a script as Slurm would, with a given end of k2jax; returns the batch script's process."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "k2jax": K2JAX}.items():
        (programs / name).write_text(text.format(python=sys.executable) if "{python}" in text else text)
        (programs / name).chmod(0o755)

    def start(job: Job, code: int = 0, state: str = "RUNNING", **environment: str) -> subprocess.Popen:
        script = tmp_path / "job.sbatch"
        script.write_text(slurm_script(job))
        subprocess.run(["bash", "-n", script], check=True)
        given = {
            "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "8195", "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_JOB_NUM_NODES": str(job.hosts), "CODE": str(code), "STATE": state, **environment,
        }  # fmt: skip
        return subprocess.Popen(["bash", script], cwd=tmp_path, env=given, stdout=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_what_each_process_gets(cluster, tmp_path):
    job = Job(
        command=("train", "configs/tiny.py", *HOSTILE),
        hosts=3,
        run_dir="/shared/it's $HOME",
        environment=tuple(f"V{n}={value}" for n, value in enumerate(HOSTILE)),
        devices=2,
    )
    assert finish(cluster(job)) == (0, "")
    for index in range(3):
        arguments, environment = json.loads((tmp_path / f"process-{index}.json").read_text())
        assert arguments == ["launch", "host", "--", "train", "configs/tiny.py", *HOSTILE, "--train.run-dir", "/shared/it's $HOME"]
        assert [environment[f"V{n}"] for n in range(len(HOSTILE))] == list(HOSTILE)
        ours = {name: value for name, value in environment.items() if name.startswith("K2JAX_")}
        assert ours == {
            "K2JAX_COORDINATOR": f"node07:{61440 + 8195 % 4096}", "K2JAX_NUM_PROCESSES": "3",
            "K2JAX_PROCESS_ID": str(index), "K2JAX_SIMULATE": "2",
        }  # fmt: skip
    assert (tmp_path / "nodelist").read_text() == "node[07-08]\n"
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "requeued").exists()
    options = json.loads((tmp_path / "srun.json").read_text())
    assert options == {
        "--ntasks": "3", "--ntasks-per-node": "1", "--kill-on-bad-exit": "0", "--wait": "0",
        "--cpu-bind": "none", "--label": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "state", "restarts", "requeued"),
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),
        (143, "RUNNING", 50, True),
        (143, "CANCELLED", 0, False),
        (143, "PREEMPTED", 0, False),
        (1, "RUNNING", 2, True),
        (1, "RUNNING", 3, False),
        (134, "RUNNING", 0, True),
    ],
)
def test_what_is_requeued(cluster, tmp_path, code, state, restarts, requeued):
    process = cluster(Job(("train", "c.py"), 2), code, state, SLURM_RESTART_COUNT=str(restarts))
    returned, out = finish(process)
    assert returned == code
    notes = tmp_path / "requeued"
    assert (notes.read_text() if notes.exists() else "") == ("requeue 8195\n" if requeued else "")
    assert ("not requeued" in out) == (code != 0 and not requeued and state == "RUNNING")


def test_sigterm_for_the_batch_script_waits_for_the_save(cluster, tmp_path):
    """Preemption may send it to all; srun goes on to the end of its tasks."""
    process = cluster(Job(("train", "c.py"), 1), 143, SECONDS_="2")
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert (tmp_path / "requeued").exists()


def directives(script: str) -> list[str]:
    """Those that sbatch reads: it stops at the first line that is neither empty nor a comment."""
    lines = []
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        lines += re.findall(r"^#SBATCH (\S.*)", line)
    return lines


def test_directives():
    job = Job(("train", *HOSTILE), 4, "deep-run", grace=90, gpus=8, environment=("A=x\n#SBATCH --nodes=99",))
    script = slurm_script(job, "2-12:00:00", "gpu,gpu-long", ["--account=team/a", "--qos=high"])
    assert directives(script) == [
        "--job-name=deep-run", "--nodes=4", "--ntasks-per-node=1", "--exclusive", "--mem=0", "--gpus-per-node=8",
        "--time=2-12:00:00", "--partition=gpu,gpu-long", "--account=team/a", "--qos=high", "--requeue",
        "--open-mode=append", "--output=deep-run-%j.log", "--signal=TERM@90",
    ]  # fmt: skip
    assert "{{" not in script


@pytest.mark.parametrize("time", ["30", "30:00", "24:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_limits_that_sbatch_takes(time):
    assert f"--time={time}" in directives(slurm_script(Job(("train",), 1), time))


def test_all_mistakes_at_once():
    job = Job(
        ("trian", "--train.run-dir=x"),
        0,
        "My Job\n$(x)",
        "r",
        0,
        -1,
        ("A", "1B=2", "C=1", "C=2", "K2JAX_PROCESS_ID=0"),
        0,
        0,
    )
    with pytest.raises(UserError) as error:
        slurm_script(job, "1h", "a b", ["--account=a b", "account", "--nodes=2", "--x=$(y)"])
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "-- trian", "--env 'A'", "--env '1B=2'", "--env C", "--env K2JAX_PROCESS_ID", "--hosts 0", "--grace 0",
        "--max-restarts -1", "--gpus-per-host 0", "--devices-per-host 0", "--name 'My Job\\n$(x)'", "--run-dir r",
        "--time '1h'", "--partition 'a b'", "--sbatch '--account=a b'", "--sbatch 'account'", "--sbatch --nodes=2",
        "--sbatch '--x=$(y)'", "--gpus-per-host 0, --devices-per-host 0",
    ]  # fmt: skip
    assert "nearest: my-job-x" in str(error.value)


@pytest.mark.parametrize("name", ["", "-a", "a-", "1a", "A", "a_b", "a" * 41, "a;b", "a\n", "a b", "$a"])
def test_names_that_are_refused_have_a_valid_neighbour(name):
    with pytest.raises(UserError) as error:
        slurm_script(Job(("train",), 1, name))
    near = error.value.problems[0].rpartition("nearest: ")[2]
    assert slurm_script(Job(("train",), 1, near))


def test_no_command():
    with pytest.raises(UserError, match="no command"):
        slurm_script(Job((), 1))


def test_arguments_that_are_no_text():
    with pytest.raises(UserError, match="must be UTF-8"):
        slurm_script(Job(("train", "\udcff"), 1))
