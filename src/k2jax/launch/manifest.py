"""A run on a cluster as its scheduler wants it written: what Slurm's script and Kubernetes' JobSet have in common.

Templates have {{name}} where a value comes. What the user gives is quoted for the language of the file around it, or
has to match a rule that leaves nothing to quote.
"""

import difflib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from k2jax.errors import UserError
from k2jax.files import write_atomic
from k2jax.launch.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, SIMULATE

COMMANDS = ("train", "generate", "eval")  # those that know of other processes
_OURS = (COORDINATOR, NUM_PROCESSES, PROCESS_ID, SIMULATE)
_LONGEST_NAME = 40  # of the 63 characters of a host name, whose rest counts jobs and pods
_RUN_DIR = re.compile(r"--train\.run[-_]dir(=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """A command of k2jax on several hosts, a process each.

    grace: seconds between SIGTERM and SIGKILL, in which a step and a save must fit. max_restarts: after failures; what
    was stopped from outside goes on without limit. environment: NAME=VALUE each. devices: CPU devices of a host, for
    trials without accelerators.
    """

    command: tuple[str, ...]
    hosts: int
    name: str = "k2jax"
    run_dir: str | None = None
    grace: int = 300
    max_restarts: int = 3
    environment: tuple[str, ...] = ()
    gpus: int | None = None
    devices: int | None = None

    def variables(self) -> dict[str, str]:
        """The environment by names."""
        return dict(given.split("=", 1) for given in self.environment)

    def simulated(self) -> dict[str, str]:
        """The variable for `devices`, if there are."""
        return {} if self.devices is None else {SIMULATE: str(self.devices)}

    def full_command(self) -> list[str]:
        """k2jax and its arguments, the run directory included, under a supervisor of each host's own."""
        return ["k2jax", "launch", "host", "--", *self.command, *(["--train.run-dir", self.run_dir] if self.run_dir else [])]


def command_problems(command: Sequence[str]) -> list[str]:
    """Everything that is wrong with what stands after --, as far as it can be known before it runs."""
    if not command:
        return ["no command: give one after --, such as -- train configs/tiny.py"]
    if command[0] not in COMMANDS:
        near = difflib.get_close_matches(command[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [f"-- {command[0]}: must be a command that runs in several processes: {', '.join(COMMANDS)}{hint}"]
    return []


def _environment_problems(environment: Sequence[str]) -> list[str]:
    problems, names = [], []
    for given in environment:
        name, equals, _ = given.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"--env {given!r}: must be NAME=VALUE, the name of letters, digits and underscores")
        elif name in _OURS:
            problems.append(f"--env {name}: is set by the manifest itself")
        elif name in names:
            problems.append(f"--env {name}: is given twice")
        names.append(name)
    return problems


def job_problems(job: Job) -> list[str]:
    """Everything that is wrong with a job on whatever cluster."""
    problems = [*command_problems(job.command), *_environment_problems(job.environment)]
    for option, value, least in (
        ("--hosts", job.hosts, 1), ("--grace", job.grace, 1), ("--max-restarts", job.max_restarts, 0),
        ("--gpus-per-host", job.gpus, 1), ("--devices-per-host", job.devices, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            problems.append(f"{option} {value}: must be at least {least}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.name) or len(job.name) > _LONGEST_NAME:
        near = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-0123456789")[:_LONGEST_NAME].rstrip("-") or "k2jax"
        rule = f"must be at most {_LONGEST_NAME} small letters, digits and hyphens, from a letter to a letter or digit"
        problems.append(f"--name {job.name!r}: {rule}; nearest: {near}")
    if job.run_dir and any(_RUN_DIR.fullmatch(argument) for argument in job.command):
        problems.append(f"--run-dir {job.run_dir}: the command has a --train.run-dir as well; give one of them")
    if job.run_dir and job.command[:1] != ("train",) and not command_problems(job.command):
        rule = f"is train's alone; {job.command[0]} is given its run directory as an argument"
        problems.append(f"--run-dir {job.run_dir}: {rule}")
    for text in (*job.command, job.run_dir or "", *job.environment):
        try:
            text.encode()
        except UnicodeEncodeError:
            problems.append(f"{text!r}: must be UTF-8")
    return problems


def fill(template: str, values: dict[str, str]) -> str:
    """A template of this folder with a value for each {{name}}; what values contain is not looked at again."""
    text = resources.files("k2jax.launch").joinpath(template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def deliver(manifest: str, out: Path | None, submit: list[str] | None) -> int:
    """Write a manifest to `out`, else to stdout; or give it to `submit`, a command that reads stdin; its exit code.

    UserError if that command is not installed, before anything is written.
    """
    if submit is not None and shutil.which(submit[0]) is None:
        raise UserError(f"--submit: {submit[0]} is not on PATH; give --out FILE, and submit it where {submit[0]} is")
    if out is not None:
        write_atomic(out, manifest)
    elif submit is None:
        print(manifest, end="")
    return 0 if submit is None else subprocess.run(submit, input=manifest, text=True, encoding="utf-8").returncode
