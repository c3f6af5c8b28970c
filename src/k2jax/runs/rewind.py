"""A run taken back to an earlier committed step, so that the data after it can be left out; nothing is deleted.

    rewound/1200-1/     the steps that came after, the records as they were
    rewinds.jsonl       a record per rewind: to which step, and the steps of data that must not be read again

Needs no jax.
"""

from dataclasses import dataclass
from pathlib import Path

from k2jax.config import Config
from k2jax.config_rules import read_steps
from k2jax.errors import UserError
from k2jax.files import write_atomic
from k2jax.runs.commits import committed_steps, move_steps, read_record, sound_step
from k2jax.runs.folder import RunFolder, read_config
from k2jax.runs.mirror import hold_run, mirror_of, open_run_folder
from k2jax.runs.records import read_records, to_line
from k2jax.words import listed


@dataclass(frozen=True)
class Rewound:
    """A rewind that was done. step: to which; newest: from which; skip: all steps of data that the run leaves out."""

    step: int
    newest: int
    skip: tuple[str, ...]
    aside: Path


def _joined(ranges: list[tuple[int, int]]) -> tuple[str, ...]:
    """Ranges of steps, which may meet, as data.skip_steps has them."""
    merged: list[list[int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([first, end])
    return tuple(f"{first}-{end - 1}" for first, end in merged)


def _problems(files: RunFolder, config: Config, step: int, skip: tuple[str, ...]) -> list[str]:
    steps = committed_steps(files.checkpoints)
    problems, newest, least = [], steps[-1] if steps else None, step
    if step not in steps:
        there = listed(steps) if steps else "none"
        problems.append(f"--to {step}: is not a committed step; there are {there}")
    elif step == newest:
        problems.append(f"--to {step}: is the newest committed step already; to leave out data after it, resume with --data.skip-steps")
    else:  # earlier skips put the steps of the data ahead of those of training
        least = read_record(files.checkpoints, step)["data_position"]["next_row"] // config.data.batch_sequences
    for text in skip:
        try:
            first, _ = read_steps(text)
        except ValueError as rule:
            problems.append(f"--skip {text}: {rule}")
            continue
        if first < least:
            problems.append(f"--skip {text}: must begin at step {least} of the data, which is next at --to {step}, or later")
    return problems


def rewind(run: str, step: int, skip: tuple[str, ...] = ()) -> Rewound:
    """Take a run that is at rest back to committed step `step`. skip: steps of data, "1200-1219", not to be read again.

    A resume then goes on from there, and only with these in data.skip_steps. Raises UserError with all that is wrong.
    """
    files = open_run_folder(run)
    config = read_config(files.path)
    if mirror_of(files.path) is not None:
        raise UserError(f"{run}: a run in a bucket cannot be rewound; copy it to a disk, and give its folder there")
    with hold_run(files.path):
        if problems := _problems(files, config, step, skip):
            raise UserError(*problems)
        steps = committed_steps(files.checkpoints)
        sound_step(files.checkpoints, step)
        past = read_records(files.rewinds, ordered=False)
        aside = files.rewound / f"{step}-{len(past) + 1}"
        aside.mkdir(parents=True)
        for file in (files.metrics, files.ledger):
            if file.exists():
                write_atomic(aside / file.name, file.read_bytes())
        # After each of these the run is whole: it demands the skips, then ends earlier and earlier, then forgets its records.
        wanted = _joined([read_steps(text) for text in (*(config.data.skip_steps or ()), *skip)])
        record = {"step": step, "newest": steps[-1], "skip": list(wanted)}
        write_atomic(files.rewinds, "".join(map(to_line, [*past, record])))
        move_steps(files.checkpoints, [number for number in steps if number > step], aside)
        for file in (files.metrics, files.ledger):
            if file.exists():
                write_atomic(file, "".join(to_line(record) for record in read_records(file) if record["step"] < step))
    return Rewound(step, steps[-1], wanted, aside)


def skip_problems(files: RunFolder, config: Config) -> list[str]:
    """Steps of data that a rewind took out of the run, and that `config` would read again."""
    rewinds = read_records(files.rewinds, ordered=False)
    given = [read_steps(text) for text in config.data.skip_steps or ()]
    wanted = [read_steps(text) for record in rewinds for text in record["skip"]]
    if all(any(a <= first and end <= b for a, b in map(read_steps, _joined(given))) for first, end in wanted):
        return []
    rule = "the run was rewound to leave out more; give data.skip_steps = "
    return [f"data.skip_steps = {config.data.skip_steps!r}: {rule}{_joined([*given, *wanted])!r}"]
