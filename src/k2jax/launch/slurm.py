"""`k2jax launch slurm`: a job script for sbatch."""

import re
import shlex
from collections.abc import Sequence

from k2jax.errors import UserError
from k2jax.launch.manifest import Job, fill, job_problems

_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:/@%+\[\]-]+)?")
_OURS = ("--nodes", "--ntasks", "--ntasks-per-node", "--requeue", "--no-requeue", "--signal", "--open-mode")


def _problems(job: Job, time: str | None, partition: str | None, options: Sequence[str]) -> list[str]:
    problems = job_problems(job)
    if time is not None and not _TIME.fullmatch(time):
        problems.append(
            f"--time {time!r}: must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00 or 2-12"
        )
    if partition is not None and not re.fullmatch(r"[A-Za-z0-9_.,-]+", partition):
        problems.append(f"--partition {partition!r}: must be letters, digits, _ . - and commas")
    for option in options:
        if not _OPTION.fullmatch(option):
            problems.append(f"--sbatch {option!r}: must be --option or --option=value without spaces or quotes")
        elif option.partition("=")[0] in _OURS:
            problems.append(f"--sbatch {option}: {option.partition('=')[0]} is set by the manifest itself")
    if job.gpus is not None and job.devices is not None:
        problems.append(
            f"--gpus-per-host {job.gpus}, --devices-per-host {job.devices}: give one; the latter are CPU devices"
        )
    return problems


def slurm_script(job: Job, time: str | None = None, partition: str | None = None, options: Sequence[str] = ()) -> str:
    """The script for sbatch. time: the limit, as sbatch takes it; options: further ones, such as --account=x.

    Raises UserError with everything that is wrong.
    """
    if problems := _problems(job, time, partition, options):
        raise UserError(*problems)
    lines = [f"--gpus-per-node={job.gpus}"] if job.gpus is not None else []
    lines += [f"--{name}={value}" for name, value in (("time", time), ("partition", partition)) if value is not None]
    environment = job.variables() | job.simulated()
    values = {
        "name": job.name,
        "hosts": str(job.hosts),
        "grace": str(job.grace),
        "max_restarts": str(job.max_restarts),
        "options": "".join(f"#SBATCH {line}\n" for line in [*lines, *options]).rstrip("\n") or "#",
        "environment": "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()),
        "command": shlex.join(job.full_command()),
    }
    return fill("slurm.sbatch", values)
