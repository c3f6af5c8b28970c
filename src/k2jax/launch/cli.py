"""The `k2jax` command. jax and all that needs it is imported by the command that runs, so that --help is quick."""

import argparse
import shlex
import sys
from pathlib import Path

from k2jax.config import RunFailed, UserError
from k2jax.launch.overrides import load_config, override, print_fields


def use_cpu_devices(count: int) -> None:
    """Make this process see `count` CPU devices and nothing else; must come before the first use of jax's devices.

    Raises UserError for a count below 1.
    """
    if count < 1:
        raise UserError(f"--simulate {count}: must be at least 1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


TRAIN_USAGE = """usage: k2jax train CONFIG [--simulate N] [--section.field value ...]

Trains, or goes on with the run in train.run_dir. Ctrl-C finishes the step, saves and says how to resume.
CONFIG is a Python file with config(), such as configs/tiny.py; `k2jax train CONFIG --help` lists its fields.
--simulate N runs on N CPU devices, even where there is an accelerator."""


def _train(args, rest: list[str]) -> int:
    if args.config is None:
        print(TRAIN_USAGE)
        return 0 if {"-h", "--help"} & set(rest) else 2
    config = load_config(args.config)
    if {"-h", "--help"} & set(rest):
        print_fields(config, f"k2jax train {args.config}")
        return 0
    config = override(config, rest)
    if args.simulate is not None:
        use_cpu_devices(args.simulate)
    from k2jax.train.loop import run

    result = run(config)
    folder = Path(config.train.run_dir)
    if result.signal is not None:
        print(f"stopped after step {result.step}, saved. Resume with:\n  k2jax {shlex.join(sys.argv[1:])}")
        return 128 + result.signal
    _show_result(folder, result)
    return 0


def _show_result(folder: Path, result) -> None:
    """What was learned: validation loss, picture, sample, and where everything lies."""
    from k2jax.train.generate import generate
    from k2jax.train.plot import plot_runs

    print(f"done: step {result.step}")
    if result.validation_bits_per_byte is not None:
        print(f"validation: {result.validation_bits_per_byte:.4f} bits per byte")
    try:
        plot_runs([str(folder)], str(folder / "curves.png"))
        print(f"curves: {folder / 'curves.png'}")
    except UserError as missing:  # the picture is an extra, the run is not
        print(f"no picture: {missing}")
    text = generate(str(folder), prompt="", num_tokens=400, temperature=0.7, seed=0)
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    print(f"metrics: {folder / 'metrics.jsonl'}\ncheckpoints: {folder / 'checkpoints'}\nTensorBoard: {folder / 'tb'}")
    print(f"sample ({folder / 'sample.txt'}; more with: k2jax generate {folder} PROMPT):\n{text}")


def _prepare(args, rest: list[str]) -> int:
    from rich.console import Console

    from k2jax.data.prepare import prepare

    console = Console(soft_wrap=True, highlight=False)
    with console.status("reading ...") as status:
        summary = prepare(
            args.source, args.out, args.tokenizer, pattern=args.pattern, exclude=args.exclude,
            validation_fraction=args.validation_fraction, text_field=args.text_field,
            progress=lambda documents, size: status.update(f"{documents:,} documents, {size / 1e6:,.1f} MB"),
        )  # fmt: skip
    for reason, entry in summary["skipped"].items():
        console.print(
            f"left out, {reason}: {entry['count']:,} (such as {', '.join(entry['examples'][:2])})", markup=False
        )
    for split, counts in summary["splits"].items():
        text = f"{counts['documents']:,} documents, {counts['text_bytes']:,} bytes, {counts['tokens']:,} tokens"
        console.print(f"{split}: {text}", markup=False)
    vocabulary = summary["tokenizer"]["vocab_size"]
    console.print(f"token store: {args.out} (model.vocab_size must be at least {vocabulary:,})", markup=False)
    return 0


def _generate(args, rest: list[str]) -> int:
    from k2jax.train.generate import generate

    print(args.prompt + generate(args.run, args.prompt, args.tokens, args.temperature, args.seed))
    return 0


def _plot(args, rest: list[str]) -> int:
    from k2jax.train.plot import plot_runs

    plot_runs(args.run, args.out)
    print(args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k2jax", description="Pretrain models of the Kimi K2 family on JAX meshes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, **options)
        sub.set_defaults(function=function, command=name)
        return sub

    sub = command("prepare", _prepare, "Turn text into a token store.")
    sub.add_argument("source", nargs="+", help="folders, text files or .jsonl files")
    sub.add_argument("--out", required=True, help="folder of the new store; must not exist")
    sub.add_argument("--tokenizer", required=True, help="byte, train:VOCAB, FILE.tiktoken or tokenizer.json")
    sub.add_argument("--pattern", default="**/*", help="which files of a folder (default: %(default)s)")
    sub.add_argument("--exclude", action="append", default=[], help="which of them not; may be repeated")
    sub.add_argument(
        "--validation-fraction", type=float, default=0.02, help="share of held-out documents (default: %(default)s)"
    )
    sub.add_argument("--text-field", default="text", help="field of a .jsonl line (default: %(default)s)")

    sub = command("train", _train, "Train; resumes where the run directory stands.", add_help=False)
    sub.add_argument("config", metavar="CONFIG", nargs="?")
    sub.add_argument("--simulate", type=int, metavar="N", help="run on N CPU devices")
    sub.usage = TRAIN_USAGE.removeprefix("usage: ")

    sub = command("generate", _generate, "Continue a text with a trained model.")
    sub.add_argument("run", help="run directory")
    sub.add_argument("prompt", nargs="?", default="")
    sub.add_argument("--tokens", type=int, default=400, help="at most this many (default: %(default)s)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("plot", _plot, "Draw loss and max logit of runs into one PNG.")
    sub.add_argument("run", nargs="+", help="run directories")
    sub.add_argument("--out", required=True, help="the PNG")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the run failed, 2 the user can mend it, 128 + n on signal n."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.function(args, rest)
    except UserError as error:
        count = len(error.problems)
        print(f"k2jax {args.command}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
        print("\n".join(f"  {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"k2jax {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """Console script."""
    sys.exit(main())
