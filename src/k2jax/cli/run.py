"""`k2jax train`."""

import shlex
import sys
from pathlib import Path

from k2jax.cli.overrides import load_config, override, print_fields
from k2jax.errors import UserError
from k2jax.files import write_atomic
from k2jax.launch.distributed import use_cpu_devices

TRAIN_USAGE = """usage: k2jax train CONFIG [--simulate N] [--section.field value ...]

Trains, or resumes the run in train.run_dir. Ctrl-C finishes the step, saves and prints how to resume.
CONFIG is a Python file with config(), such as configs/tiny.py; `k2jax train CONFIG --help` lists its fields.
--simulate N runs on N CPU devices, even where there is an accelerator.
--change-mixture lets a resumed run use other sources, weights or epochs; the steps done keep theirs."""


def train(args, rest: list[str]) -> int:
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

    result = run(config, args.change_mixture)
    folder = Path(config.train.run_dir)
    if result.signal is not None:
        print(f"stopped after step {result.step}, saved. Resume with:\n  k2jax {shlex.join(sys.argv[1:])}")
        return 128 + result.signal
    _show_result(folder, result)
    return 0


def _show_result(folder: Path, result) -> None:
    """Print validation loss, picture, sample, and the paths of everything."""
    from k2jax.inference.generate import generate
    from k2jax.inference.load import load_run
    from k2jax.report.curves import plot_runs
    from k2jax.runs.folder import checkpoints_of

    print(f"done: step {result.step}")
    if result.validation_bits_per_byte is not None:
        print(f"validation: {result.validation_bits_per_byte:.4f} bits per byte")
    try:
        plot_runs([str(folder)], str(folder / "curves.png"))
        print(f"curves: {folder / 'curves.png'}")
    except UserError as missing:  # the picture is an extra, the run is not
        print(f"no picture: {missing}")
    text = generate(load_run(folder), [""], num_tokens=400, temperature=0.7, seed=0)[0]
    write_atomic(folder / "sample.txt", text)
    print(f"metrics: {folder / 'metrics.jsonl'}\ncheckpoints: {checkpoints_of(folder)}\nTensorBoard: {folder / 'tb'}")
    print(f"sample ({folder / 'sample.txt'}; more with: k2jax generate {folder} PROMPT):\n{text}")
