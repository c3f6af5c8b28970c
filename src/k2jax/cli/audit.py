"""`k2jax audit`."""

import json
from pathlib import Path

from k2jax.cli.overrides import load_config, override
from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.files import is_url
from k2jax.words import counted

_OF_PLACES = "data.validation_path", "data.index_dir", "data.tokenizer"


def _config_of_run(folder: Path, rest: list[str]) -> Config:
    """A run's own config. Options may say where files are now, and nothing that would change what the run has read."""
    from k2jax.config import differences
    from k2jax.runs.folder import read_config

    stored = read_config(folder)
    config = override(stored, rest)
    rule = f"an audit answers for the run as it is; leave it out, or give {' or '.join(_OF_PLACES)}"
    if changed := {n: pair for n, pair in differences(stored, config).items() if n not in _OF_PLACES}:
        raise UserError(
            *(f"{n} = {new!r}: the run in {folder} has {old!r}; {rule}" for n, (old, new) in changed.items())
        )
    return config


def _open_audit(args, rest: list[str]):
    """(config, reader) of a run directory, or of a config whose run has not begun."""
    from k2jax.data.loader.corpus import open_corpus, open_data
    from k2jax.data.loader.rows import RowReader
    from k2jax.data.loader.segments import read_segments, segment_paths, settle_timeline
    from k2jax.data.loader.timeline import make_timeline
    from k2jax.runs.mirror import open_run_folder

    is_run = is_url(args.run) or Path(args.run).is_dir()
    config = _config_of_run(open_run_folder(args.run).path, rest) if is_run else override(load_config(args.run), rest)
    segments = read_segments(open_run_folder(args.run if is_run else config.train.run_dir).timeline)
    if args.data is None and not segments:
        corpus = open_data(config)
    else:
        paths = args.data or segment_paths(segments)
        corpus = open_corpus(paths, config.data.tokenizer, config.data.index_dir, namesakes=True)
    timeline = make_timeline(segments, config) if segments else settle_timeline(corpus, config)[0]
    return config, RowReader(corpus, timeline, config)


def _open_held_out(config: Config):
    """The corpus of data.validation_path; None if it is not given."""
    from k2jax.data.loader.corpus import open_corpus

    data = config.data
    return data.validation_path and open_corpus(data.validation_path, data.tokenizer, data.index_dir)


def _check_audit(args) -> None:
    problems = []
    if [args.step is not None, args.document is not None, args.tokens].count(True) != 1:
        problems.append("audit: give one of --step N, --document ID and --tokens")
    if args.place is not None and args.step is None:
        problems.append(f"--place {args.place}: goes with --step alone, a row of whose batch it is")
    if args.until is not None and args.step is not None:
        problems.append(f"--until {args.until}: does not go with --step, which is one step; drop one of them")
    if args.until is not None and args.until < 0:
        problems.append(f"--until {args.until}: must be at least 0, a number of steps")
    if problems:
        raise UserError(*problems)


def audit(args, rest: list[str]) -> int:
    """Print what the timeline of a run says of steps, documents and sources."""
    from k2jax.data.loader import audit as audits

    _check_audit(args)
    config, reader = _open_audit(args, rest)
    if args.place is not None and not 0 <= args.place < config.data.batch_sequences:
        raise UserError(f"--place {args.place}: a batch has rows 0 to {config.data.batch_sequences - 1}")
    until = config.train.num_steps if args.until is None else args.until
    if args.step is not None:
        audits.check_step(args.step, config.train.num_steps)
        found = [row for row in audits.step_documents(reader, args.step) if args.place in (None, row["place"])]
        lines = map(_row_line, found)
    elif args.document is not None:
        documents = audits.find_documents(reader, args.document, _open_held_out(config))
        if not documents:
            places = ",".join(filter(None, (reader.corpus.path, config.data.validation_path)))
            raise UserError(f"--document {args.document}: no document of {places} has this name or sha256")
        found = [*audits.sightings(reader, documents, until)]
        lines = map(_seen_line, found)
    else:
        found = audits.token_account(reader, config, until)
        lines = map(_account_line, found)
    print("\n".join(map(json.dumps, found) if args.json else lines) or f"not seen in {counted(until, 'step')}")
    return 0


def _row_line(row: dict) -> str:
    title = f"{row['place']:>6}  row {row['row']}: {row['source']}, window {row['window']}, pass {row['epoch']}"
    parts = [f"{' ' * 8}{d['name']}, tokens {d['tokens'][0]}-{d['tokens'][1] - 1}" for d in row["documents"]]
    return "\n".join([title, *parts])


def _seen_line(seen: dict) -> str:
    if "unread" in seen:
        return f"{seen['unread']}, so no step reads it: {seen['source']}, document {seen['document']}"
    when = "left out by data.skip_steps" if seen["step"] is None else f"step {seen['step']}"
    what = f"{seen['source']}, document {seen['document']}, window {seen['window']}, pass {seen['epoch']}"
    return f"{when}, row {seen['place']} of the batch: {what}"


def _account_line(entry: dict) -> str:
    shares = f"share {entry['share']:.7f}, planned {entry['planned_share']:.7f}"
    return f"{entry['source']}: {entry['tokens']:,} tokens, {shares}, {entry['epochs']:.4f} passes"
