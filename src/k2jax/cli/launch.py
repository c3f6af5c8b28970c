"""`k2jax launch`: a command of k2jax in several processes, on this machine or on a cluster."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from k2jax.cli.overrides import load_config, override
from k2jax.cli.run import train_options
from k2jax.errors import UserError
from k2jax.launch.jobset import jobset_manifest
from k2jax.launch.local import run_again, run_on_host
from k2jax.launch.manifest import Job, command_problems, deliver
from k2jax.launch.slurm import slurm_script


def _command(args) -> list[str]:
    """The command after --, by this Python."""
    return [sys.executable, "-m", "k2jax", *args.arguments]


def _local(args) -> int:
    problems = [f"-n {args.processes}: must be at least 1"] if args.processes < 1 else []
    if args.devices_per_process is not None and args.devices_per_process < 1:
        problems.append(f"--devices-per-process {args.devices_per_process}: must be at least 1")
    if args.max_restarts is not None and args.max_restarts < 0:
        problems.append(f"--max-restarts {args.max_restarts}: must be at least 0")
    if problems := problems + command_problems(args.arguments):
        raise UserError(*problems)
    restarts = args.max_restarts
    if restarts is None:  # a run goes on from its checkpoints, another command would begin again
        restarts = Job.max_restarts if args.arguments[0] == "train" else 0
    return run_again(_command(args), args.processes, args.devices_per_process, args.log_dir, restarts)


def _host(args) -> int:
    if problems := command_problems(args.arguments):
        raise UserError(*problems)
    return run_on_host(_command(args))


def _job(args) -> Job:
    return Job(
        command=tuple(args.arguments),
        hosts=args.hosts,
        name=args.name,
        run_dir=args.run_dir,
        grace=args.grace,
        max_restarts=args.max_restarts,
        environment=tuple(args.env),
        gpus=args.gpus_per_host,
        devices=args.devices_per_host,
    )


def _config_problems(arguments: list[str], run_dir: str | None) -> list[str]:
    """Everything that is wrong with the config of a `train` command, as it is on this machine."""
    if arguments[:1] != ["train"]:
        return []
    parser = argparse.ArgumentParser(prog="k2jax launch -- train", add_help=False, allow_abbrev=False)
    train_options(parser)
    known, rest = parser.parse_known_args(arguments[1:])
    if known.config is None:
        return ["-- train: has no CONFIG; give a config file, such as configs/tiny.py"]
    try:
        override(load_config(known.config), [*rest, *(["--train.run-dir", run_dir] if run_dir else [])])
    except UserError as error:
        hint = "paths are seen from this machine and folder; if the config is only where the job runs, give --unchecked"
        return [*error.problems, *([] if Path(known.config).is_file() else [hint])]
    return []


def _checked(make_manifest: Callable[[], str], args) -> str:
    """The manifest. UserError with all that is wrong with the job and, unless it is --unchecked, with its config."""
    problems = [] if args.unchecked else _config_problems(args.arguments, args.run_dir)
    try:
        manifest = make_manifest()
    except UserError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise UserError(*problems)
    return manifest


def _slurm(args) -> int:
    script = _checked(lambda: slurm_script(_job(args), args.time, args.partition, args.sbatch), args)
    return deliver(script, args.out, ["sbatch"] if args.submit else None)


def _jobset(args) -> int:
    manifest = _checked(lambda: jobset_manifest(_job(args), args.image, args.tpu, args.volume), args)
    return deliver(manifest, args.out, ["kubectl", "apply", "-f", "-"] if args.submit else None)


def launch(args, rest: list[str]) -> int:
    """The exit code of what was launched; 0 for a manifest that was only written."""
    return {"local": _local, "host": _host, "slurm": _slurm, "jobset": _jobset}[args.where](args)


def _cluster_options(sub: argparse.ArgumentParser, submits_with: str) -> None:
    sub.add_argument("--hosts", type=int, required=True, metavar="N", help="hosts, a process each")
    sub.add_argument("--name", default=Job.name, help="name of the job (default: %(default)s)")
    sub.add_argument("--run-dir", metavar="DIR", help="run directory that all hosts share; as --train.run-dir")
    sub.add_argument("--gpus-per-host", type=int, metavar="G", help="GPUs of a host")
    sub.add_argument("--devices-per-host", type=int, metavar="D", help="CPU devices of a host, for a trial")
    sub.add_argument(
        "--grace", type=int, default=Job.grace, metavar="SECONDS", help="from SIGTERM to SIGKILL (default: %(default)s)"
    )
    sub.add_argument(
        "--max-restarts", type=int, default=Job.max_restarts, metavar="N", help="after failures (default: %(default)s)"
    )
    sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    sub.add_argument("--unchecked", action="store_true", help="the config is not here, but where the job runs")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the manifest there (default: stdout)")
    sub.add_argument("--submit", action="store_true", help=f"give it to {submits_with} at once")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The places to launch at, and their options."""
    places = parser.add_subparsers(dest="where", required=True, metavar="PLACE")

    def place(name: str, help: str) -> argparse.ArgumentParser:
        usage = f"k2jax launch {name} OPTIONS -- COMMAND ..."
        sub = places.add_parser(name, help=help, description=help, usage=usage, allow_abbrev=False)
        sub.add_argument("arguments", nargs="*", metavar="COMMAND", help="after --, such as train configs/tiny.py")
        return sub

    sub = place("local", "Processes on this machine: many hosts on a laptop, and in CI.")
    sub.add_argument("-n", "--processes", type=int, required=True, metavar="N", help="processes")
    sub.add_argument(
        "--devices-per-process", type=int, metavar="D", help="CPU devices of each (default: what jax finds)"
    )
    sub.add_argument("--log-dir", type=Path, metavar="DIR", help="what each process writes, as rank-I.log in DIR")
    most = f"restarts in a row without a newer checkpoint (default: {Job.max_restarts} of train, else 0)"
    sub.add_argument("--max-restarts", type=int, metavar="N", help=most)

    place("host", "This host's process of a run on a cluster, supervised: what the manifests below start on every host.")

    sub = place("slurm", "Write a job script for Slurm.")
    _cluster_options(sub, "sbatch")
    sub.add_argument("--time", metavar="LIMIT", help="such as 24:00:00 (default: the partition's)")
    sub.add_argument("--partition", help="partitions, joined by commas (default: the cluster's)")
    sub.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="=--OPTION",
        help="such as --sbatch=--account=x; may be repeated",
    )

    sub = place("jobset", "Write a JobSet for Kubernetes: GPU nodes, or TPU slices on GKE.")
    _cluster_options(sub, "kubectl apply")
    sub.add_argument("--image", required=True, help="image with k2jax, the config and its own imports")
    sub.add_argument("--tpu", metavar="SLICE", help="a slice such as v5p:4x4x4; as many as the hosts make")
    sub.add_argument(
        "--volume", action="append", default=[], metavar="CLAIM=/PATH", help="shared volume; may be repeated"
    )
