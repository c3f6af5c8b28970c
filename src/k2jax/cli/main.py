"""The `k2jax` command. jax and all that needs it is imported by the command that runs, so that --help is quick."""

import argparse
import dataclasses
import errno
import os
import sys

from k2jax import processes
from k2jax.cli import audit, data, goodput, launch, model, plan, rewind, run, verify
from k2jax.config import MeshConfig
from k2jax.errors import RunFailed, UserError, exit_code
from k2jax.launch.distributed import NotComing, decline
from k2jax.words import counted

_DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO


def _reading_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", nargs="+", help="PATH or NAME=PATH: folders, text, .jsonl, .parquet, .gz, .zst, URLs")
    sub.set_defaults(more="source")
    sub.add_argument("--pattern", default="**/*", help="files to read in a folder (default: %(default)s)")
    sub.add_argument("--exclude", action="append", default=[], help="files to leave out; may be repeated")
    sub.add_argument("--text-field", default="text", help="field or column of the text (default: %(default)s)")
    sub.add_argument(
        "--skip-bad-lines", type=int, default=0, metavar="N", help="leave out up to N unreadable lines (default: none)"
    )


def _preparing_commands(command) -> None:
    sub = command("prepare", data.prepare, "Turn text into a token store; resumes if a run of it was killed.")
    _reading_options(sub)
    sub.add_argument("--out", required=True, help="folder of the new store; must not exist")
    sub.add_argument(
        "--tokenizer", required=True, help="byte, train:VOCAB, FILE.tiktoken, tiktoken.model or tokenizer.json"
    )
    sub.add_argument(
        "--validation-fraction", type=float, default=0.02, help="share of held-out documents (default: %(default)s)"
    )
    sub.add_argument("--min-chars", type=int, default=1, help="shortest document (default: %(default)s)")
    sub.add_argument("--max-chars", type=int, help="longest document (default: any)")
    sub.add_argument("--filter", action="append", default=[], help="repetition or quality (Gopher's); may be repeated")
    sub.add_argument(
        "--near-duplicates", type=float, metavar="J", help="drop documents with similarity J or more; 0.8 is usual"
    )
    sub.add_argument("--executor", default="local", help="local, slurm or ray (default: %(default)s)")
    sub.add_argument("--workers", type=int, default=1, help="parallel workers (default: %(default)s)")
    sub.add_argument(
        "--executor-option", action="append", default=[], metavar="KEY=VALUE", help="such as partition=cpu for slurm"
    )

    sub = command("rephrase", data.rephrase, "Rewrite documents with a model behind an OpenAI-compatible URL.")
    _reading_options(sub)
    sub.add_argument("--out", required=True, help="folder of the variants; the same command resumes in it")
    sub.add_argument("--url", required=True, help="URL of the endpoint, such as http://localhost:8000/v1")
    sub.add_argument("--model", required=True, help="name of the model at the endpoint")
    sub.add_argument(
        "--key-from",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable with the key (default: %(default)s)",
    )
    sub.add_argument("--variants", type=int, default=2, help="at most, per document (default: %(default)s)")
    sub.add_argument("--styles", metavar="FILE", help="JSON list of names and prompts (default: five of ours)")
    sub.add_argument("--chunk-chars", type=int, default=4000, help="characters sent at once (default: %(default)s)")
    sub.add_argument("--min-chars", type=int, default=200, help="shortest document (default: %(default)s)")
    sub.add_argument("--parallel", type=int, default=8, help="parallel documents (default: %(default)s)")
    sub.add_argument("--timeout", type=float, default=120, help="seconds to wait for an answer (default: %(default)s)")
    sub.add_argument("--retries", type=int, default=4, help="retries after temporary failures (default: %(default)s)")


def _run_commands(command) -> None:
    sub = command("train", run.train, "Train a config, or resume the run in its directory.", add_help=False)
    run.train_options(sub)
    sub.usage = run.TRAIN_USAGE.removeprefix("usage: ")

    launch.add_options(command("launch", launch.launch, "Run in several processes, on this machine or on a cluster."))

    sub = command("inspect", plan.inspect, "Show parameters, their layout and the mesh; needs no devices.")
    sub.add_argument("config", metavar="CONFIG", help="a config file or run directory; --section.field value overrides")
    sub.add_argument("--json", action="store_true", help="print it all as JSON")
    sub.add_argument("--png", metavar="FILE", help="draw the mesh")

    sub = command("plan", plan.plan, "Compile the training step for TPUs or GPUs that are not here: memory, collectives.")
    sub.add_argument("config", metavar="CONFIG", help="a config file or run directory; --section.field value overrides")
    sub.add_argument("--topology", metavar="NAME", required=True, help="v5p:8x8x16, v6e:16x16; slices: 2xv5p:8x8x16; GPUs: h100:HOSTSx8, h200:HOSTSx8, gb200:RACKSx18x4")
    sub.add_argument("--json", action="store_true", help="print it all as JSON")

    sub = command("audit", audit.audit, "Show the documents of a step, the steps of a document, or tokens per source.")
    sub.add_argument("run", help="run directory, begun or not, or a config file; --section.field value overrides")
    sub.add_argument("--step", type=int, help="list the documents of every row of this step")
    sub.add_argument("--place", type=int, help="only of this row of the batch")
    sub.add_argument("--document", metavar="ID", help="list the steps that see it: name, or 16 digits of its sha256")
    sub.add_argument("--tokens", action="store_true", help="tokens per source, planned and read")
    sub.add_argument("--until", type=int, metavar="STEP", help="after this many steps (default: the whole run)")
    sub.add_argument("--data", metavar="STORES", help="where the stores are now, joined by commas (default: the run's)")
    sub.add_argument("--json", action="store_true", help="print JSON, a line for each row, time or source")

    sub = command("verify", verify.verify, "Check the digests of a run's checkpoints; name damaged files and arrays.")
    sub.add_argument("run", help="run directory")
    sub.add_argument("--step", type=int, help="only this step (default: all)")

    sub = command("goodput", goodput.goodput, "Show what the time of a run went to, over all of its starts.")
    sub.add_argument("run", help="run directory")
    sub.add_argument("--json", action="store_true", help="print it as JSON")

    sub = command("rewind", rewind.rewind, "Take a run back to an earlier checkpoint, to leave out data after it.")
    sub.add_argument("run", help="run directory, of a run that is at rest")
    sub.add_argument("--to", type=int, required=True, metavar="STEP", help="committed step from which it will go on")
    sub.add_argument("--skip", default="", metavar="A-B,C-D", help="steps of data that are not read again")

    sub = command("plot", plan.plot, "Draw loss and max logit of runs into one PNG.")
    sub.add_argument("run", nargs="+", help="run directories")
    sub.set_defaults(more="run")
    sub.add_argument("--out", required=True, help="the PNG")


def _mesh_options(sub: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(MeshConfig):
        sub.add_argument(f"--mesh.{field.name}", type=int, metavar="N", help=argparse.SUPPRESS)
    run.process_options(sub)
    axes = "replica, fsdp, expert, tensor, and context where nothing is generated"
    sub.epilog = f"--mesh.AXIS N spreads the model over all devices: {axes}."


def _model_commands(command) -> None:
    sub = command("generate", model.generate, "Continue texts with a trained model.")
    sub.add_argument("run", help="run directory, or folder of a published checkpoint")
    sub.add_argument("prompt", nargs="*", default=[""], help="one or more prompts, continued together")
    sub.set_defaults(more="prompt")
    sub.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    sub.add_argument("--tokens", type=int, default=400, help="maximum number of tokens (default: %(default)s)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0)
    _mesh_options(sub)

    sub = command("eval", model.evaluate, "Perplexity on a held-out store, or tasks of the evaluation harness.")
    sub.add_argument("run", help="run directory, or folder of a published checkpoint")
    sub.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    sub.add_argument("--data", metavar="STORE", help="token store (default: the run's)")
    sub.add_argument("--source", help="only held-out text of this source (default: all)")
    sub.add_argument("--sequences", type=int, help="held-out sequences (default: all)")
    sub.add_argument("--length", type=int, help="tokens of a sequence (default: what the model was trained with)")
    sub.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval instead")
    sub.add_argument("--task-folder", help="folder with YAML files of further tasks")
    sub.add_argument("--limit", type=int, help="documents per task (default: all)")
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    _mesh_options(sub)

    sub = command("import", model.import_, "Make a run directory from a published checkpoint.", allow_abbrev=False)
    sub.add_argument("folder", metavar="DIR", help="config.json, safetensors files and tokenizer")
    sub.add_argument("--to", metavar="RUN", help="new run directory (default: runs/NAME of DIR)")
    sub.add_argument("--drop-mtp", action="store_true", help="drop the layers for multi-token prediction")
    sub.add_argument("--simulate", type=int, metavar="N", help="on N CPU devices")

    sub = command("export", model.export, "Write a checkpoint as safetensors that other libraries read.")
    sub.add_argument("run", metavar="RUN", help="run directory")
    sub.add_argument("--to", metavar="DIR", required=True, help="new folder")
    sub.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of the weights (default: %(default)s)")
    sub.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    sub.add_argument("--rope", choices=("plain", "yarn"), help="RoPE to write (default: as the step was trained)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k2jax", description="Pretrain models of the Kimi K2 family on JAX meshes.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str, **options) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=help, **options)
        sub.set_defaults(function=function, command=name)
        return sub

    _preparing_commands(command)
    _run_commands(command)
    _model_commands(command)
    return parser


def _report(command: str, error: BaseException) -> int:
    """Say what ended the command, in lines for its user, and return the exit code. Anything else is raised again."""
    if isinstance(error, UserError):
        count = len(error.problems)
        print(f"k2jax {command}: {counted(count, 'problem')}", file=sys.stderr)
        print("\n".join(f"  {problem}" for problem in error.problems), file=sys.stderr)
    elif isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    elif isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS):
        # A full or read-only disk, a file without permission: nothing of ours is wrong.
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"k2jax {command}: {name}{error.strerror}", file=sys.stderr)
    elif isinstance(error, RunFailed):
        print(f"k2jax {command}: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        raise error
    return exit_code(error)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 run failed, 2 the user can correct it, 128 + n on signal n."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if (name := getattr(args, "more", None)) and not any(argument.startswith("-") for argument in rest):
        # argparse closes a list at the first option after it: `generate RUN --tokens 20 PROMPT` leaves PROMPT over.
        given = [value for value in getattr(args, name) if value != ""]
        setattr(args, name, [*given, *rest] or [""])
        rest = []
    if rest and args.command not in ("train", "inspect", "plan", "import", "audit"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.function(args, rest)
    except (Exception, KeyboardInterrupt) as error:
        if processes.count() > 1:
            processes.fail(error)
        code = _report(args.command, error)
        if isinstance(error, NotComing):
            decline(error, run.say)
        return code


def entry() -> None:
    """Console script."""
    sys.stdout.reconfigure(line_buffering=True)  # logs of clusters and pipes get each line when it is written
    sys.exit(main())
