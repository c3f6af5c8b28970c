"""`k2jax train`."""

import argparse
import contextlib
import os
import shlex
import sys

from k2jax import processes
from k2jax.cli.overrides import load_config, overridden, print_fields
from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.files import write_atomic
from k2jax.launch import distributed

TRAIN_USAGE = """usage: k2jax train CONFIG [--simulate N] [--section.field value ...]

Trains, or resumes the run in train.run_dir. Ctrl-C finishes the step, saves and prints how to resume; again, it ends at once.
CONFIG is a Python file with config(), such as configs/tiny.py; `k2jax train CONFIG --help` lists its fields.
--simulate N runs on N CPU devices, even where there is an accelerator.
--coordinator HOST:PORT --num-processes N --process-id I join N processes, on any number of hosts, to one run; without
them srun, mpirun, SkyPilot and TPU pods are recognised, and the variables K2JAX_COORDINATOR, K2JAX_NUM_PROCESSES,
K2JAX_PROCESS_ID and K2JAX_SIMULATE stand for the options. --join-timeout S: patience with processes that come late.
--change-mixture lets a resumed run use other sources, weights or epochs; the steps done keep theirs."""


def process_options(sub: argparse.ArgumentParser) -> None:
    """The options of commands that run in several processes."""
    sub.add_argument("--simulate", type=int, metavar="N", help="run on N CPU devices")
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, as the others reach it")
    sub.add_argument("--num-processes", type=int, metavar="N", help="processes of the run")
    sub.add_argument("--process-id", type=int, metavar="I", help="of this one: 0 to N - 1")
    patience = distributed.JOIN_SECONDS
    sub.add_argument("--join-timeout", type=float, default=patience, metavar="S", help="seconds to wait for the others")


def train_options(sub: argparse.ArgumentParser) -> None:
    """The options of `train`, beside the fields of its config."""
    sub.add_argument("config", metavar="CONFIG", nargs="?")
    process_options(sub)
    sub.add_argument("--change-mixture", action="store_true", help="resume with another mixture")


def _membership_options(args) -> dict[str, object]:
    return {
        distributed.COORDINATOR: args.coordinator,
        distributed.NUM_PROCESSES: args.num_processes,
        distributed.PROCESS_ID: args.process_id,
    }


def say(text: str) -> None:
    """A line for the user that is no result."""
    print(text, file=sys.stderr, flush=True)


def before_joining(args) -> contextlib.AbstractContextManager[None]:
    """Of a UserError inside, before `join_processes`, the other processes of the run are told."""
    return distributed.before_joining(_membership_options(args), os.environ, args.join_timeout)


def join_processes(args) -> None:
    """Choose this process's devices and connect it with the others of its run, by the options and the environment."""
    simulate = os.environ.get(distributed.SIMULATE) if args.simulate is None else args.simulate
    if simulate is not None:
        with before_joining(args):
            distributed.use_cpu_devices(simulate)
    distributed.join(_membership_options(args), os.environ, say, args.join_timeout)


def _further_problems(config: Config, problems: list[str], args) -> list[str]:
    """Mistakes beside the config's own `problems`, for which the run is not begun."""
    from k2jax.train.mistakes import device_problems, path_problems

    joins = distributed.membership(_membership_options(args), os.environ) is not None  # devices that are not known yet
    if joins or any(problem.startswith("mesh.") for problem in problems):
        return path_problems(config)
    join_processes(args)
    return [*device_problems(config), *path_problems(config)]


def train(args, rest: list[str]) -> int:
    if args.config is None:
        print(TRAIN_USAGE)
        return 0 if {"-h", "--help"} & set(rest) else 2
    if {"-h", "--help"} & set(rest):
        print_fields(load_config(args.config), f"k2jax train {args.config}")
        return 0
    with before_joining(args):
        config, problems = overridden(load_config(args.config), rest)
        if problems:
            raise UserError(*problems, *_further_problems(config, problems, args))
    join_processes(args)
    from k2jax.train.loop import run

    result = run(config, args.change_mixture)
    first, many = processes.is_first(), processes.count() > 1
    processes.leave()
    if result.signal is not None:
        if first:
            how = "by what started the processes, each of which ran" if many else "with"
            print(f"stopped after step {result.step}, saved. Resume {how}:\n  k2jax {shlex.join(sys.argv[1:])}")
        return 128 + result.signal
    if first:
        _show_result(config.train.run_dir, result, with_sample=not many)
    return 0


def _show_result(run_dir: str, result, with_sample: bool) -> None:
    """Print validation loss, picture, sample, and the paths of everything."""
    from k2jax.inference.generate import generate
    from k2jax.inference.load import load_run
    from k2jax.report.curves import plot_runs
    from k2jax.runs.mirror import run_folder, shown, upload

    files = run_folder(run_dir)
    print(f"done: step {result.step}")
    if result.validation_bits_per_byte is not None:
        print(f"validation: {result.validation_bits_per_byte:.4f} bits per byte")
    try:
        plot_runs([run_dir], str(files.curves))
        print(f"curves: {shown(files.curves)}")
    except UserError as missing:  # the picture is an extra, the run is not
        print(f"no picture: {missing}")
    paths = {"metrics": files.metrics, "checkpoints": files.checkpoints, "TensorBoard": files.tensorboard}
    print("\n".join(f"{what}: {shown(path)}" for what, path in paths.items()))
    if not with_sample:  # this process has no longer the devices that the model may need
        print(f"a sample: k2jax generate {run_dir} PROMPT")
    else:
        text = generate(load_run(run_dir), [""], num_tokens=400, temperature=0.7, seed=0)[0]
        write_atomic(files.sample, text)
        print(f"sample ({shown(files.sample)}; more with: k2jax generate {run_dir} PROMPT):\n{text}")
    upload(files.path)  # picture and sample
