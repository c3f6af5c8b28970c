"""What each command of `k2jax` does. jax and all that needs it is imported by the command that runs."""

import json
import shlex
import shutil
import sys
from pathlib import Path

from k2jax.config import Config, UserError
from k2jax.launch.overrides import load_config, override, print_fields, read_overrides


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
--simulate N runs on N CPU devices, even where there is an accelerator.
--change-mixture lets a run go on with other sources, weights or epochs than it had; what is done stays as it was."""


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
    """What was learned: validation loss, picture, sample, and where everything lies."""
    from k2jax.train.generate import generate
    from k2jax.train.loaded import load_run
    from k2jax.train.plot import plot_runs

    print(f"done: step {result.step}")
    if result.validation_bits_per_byte is not None:
        print(f"validation: {result.validation_bits_per_byte:.4f} bits per byte")
    try:
        plot_runs([str(folder)], str(folder / "curves.png"))
        print(f"curves: {folder / 'curves.png'}")
    except UserError as missing:  # the picture is an extra, the run is not
        print(f"no picture: {missing}")
    text = generate(load_run(folder), [""], num_tokens=400, temperature=0.7, seed=0)[0]
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    print(f"metrics: {folder / 'metrics.jsonl'}\ncheckpoints: {folder / 'checkpoints'}\nTensorBoard: {folder / 'tb'}")
    print(f"sample ({folder / 'sample.txt'}; more with: k2jax generate {folder} PROMPT):\n{text}")


def inspect(args, rest: list[str]) -> int:
    """Print what a config means, from abstract shapes."""
    config = override(load_config(args.config), rest)
    from k2jax.train import inspect as inspection

    found = inspection.describe(config)
    if args.png:
        inspection.plot_mesh(config, args.png)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(inspection.tables(found))
    print(inspection.draw_mesh(config, shutil.get_terminal_size((120, 24)).columns))
    return 0


def plan(args, rest: list[str]) -> int:
    """Compile the step of a config for a topology, and print what it needs."""
    config = override(load_config(args.config), rest)
    use_cpu_devices(1)  # whatever is here takes no part
    from k2jax.plan.aot import describe_step, plan_lines
    from k2jax.plan.topology import topology_mesh

    found = describe_step(config, topology_mesh(config.mesh, args.topology))
    print(json.dumps(found, indent=2) if args.json else "\n".join(plan_lines(found)))
    return 0


_OF_PLACES = "data.validation_path", "data.index_dir", "data.tokenizer"


def _config_of_run(folder: Path, rest: list[str]) -> Config:
    """A run's own config. Options may say where files are now, and nothing that would change what the run has read."""
    from k2jax.config import differences
    from k2jax.train.run_dir import read_config

    stored = read_config(folder)
    config = override(stored, rest)
    rule = f"an audit answers for the run as it is; leave it out, or give {' or '.join(_OF_PLACES)}"
    if changed := {n: pair for n, pair in differences(stored, config).items() if n not in _OF_PLACES}:
        raise UserError(*(f"{n} = {new!r}: the run in {folder} has {old!r}; {rule}" for n, (old, new) in changed.items()))
    return config


def _open_audit(args, rest: list[str]):
    """(config, reader) of a run directory, or of a config whose run has not begun."""
    from k2jax.data.corpus import open_corpus, open_data
    from k2jax.data.mixture import make_timeline
    from k2jax.data.plan import plan_run
    from k2jax.data.rows import RowReader
    from k2jax.train.timeline_file import plan_paths, read_plan

    is_run = Path(args.run).is_dir()
    config = _config_of_run(Path(args.run), rest) if is_run else override(load_config(args.run), rest)
    plan = read_plan(Path(args.run) if is_run else Path(config.train.run_dir))
    if args.data is None and not plan:
        corpus = open_data(config)
    else:
        paths = args.data or plan_paths(plan)
        corpus = open_corpus(paths, config.data.tokenizer, config.data.index_dir, namesakes=True)
    timeline = make_timeline(plan, config) if plan else plan_run(corpus, config)[0]
    return config, RowReader(corpus, timeline, config)


def _open_held_out(config: Config):
    """What data.validation_path has; None where it is not given."""
    from k2jax.data.corpus import open_corpus

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
    from k2jax.data import audit as audits

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
    print("\n".join(map(json.dumps, found) if args.json else lines) or f"not seen in {until} steps")
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


def _load(source: str, step: int | None):
    """A run, or the folder of a published checkpoint: the one has checkpoints, the other a model_type."""
    from k2jax.train.loaded import load_run

    config = Path(source) / "config.json"
    if config.is_file() and '"model_type"' in config.read_text(encoding="utf-8"):
        if step is not None:
            raise UserError(f"--step {step}: {source} is a published checkpoint, which has no steps")
        from k2jax.interop.hf import load_published

        return load_published(source)
    return load_run(source, step)


def generate(args, rest: list[str]) -> int:
    """Print each prompt with its continuation."""
    from k2jax.train import generate as generation

    generation.check_sampling(args.tokens, args.temperature, args.seed)
    texts = generation.generate(_load(args.run, args.step), args.prompt, args.tokens, args.temperature, args.seed)
    print("\n---\n".join(prompt + text for prompt, text in zip(args.prompt, texts, strict=True)))
    return 0


def evaluate(args, rest: list[str]) -> int:
    """Perplexity on a held-out split, or tasks of the evaluation harness."""
    others = ("data", "source", "sequences", "length") if args.tasks else ("task_folder", "limit")
    where = "does not go with --tasks" if args.tasks else "goes with --tasks alone"
    problems = [f"--{n.replace('_', '-')}: {where}" for n in others if getattr(args, n) is not None]
    if args.limit is not None and args.limit < 1:
        problems.append(f"--limit {args.limit}: must be at least 1")
    if problems:
        raise UserError(*problems)
    if args.tasks:
        from k2jax.train.harness import run_tasks

        results, shortened = run_tasks(_load(args.run, args.step), args.tasks.split(","), args.task_folder, args.limit)
        print(json.dumps({"results": results, "requests_shortened": shortened}, indent=2, default=str))
        return 0
    from k2jax.data.corpus import open_corpus, open_data
    from k2jax.train.evaluate import perplexity

    loaded = _load(args.run, args.step)
    data = loaded.config.data
    if args.data is None and "://" not in data.path and not any(Path(path).exists() for path in data.path.split(",")):
        raise UserError(f"{args.run}: its token store, {data.path!r}, is not here; give --data STORE")
    corpus = open_data(loaded.config) if args.data is None else open_corpus(args.data, data.tokenizer, data.index_dir)
    found = perplexity(loaded, corpus, args.sequences, args.length, args.source)
    if args.json:
        print(json.dumps(found._asdict(), indent=2))
    else:
        nats = f"{found.nats_per_token:.4f} nats per token"
        print(f"perplexity {found.perplexity:.4f} ({nats}) over {found.tokens:,} tokens")
        print(f"{found.bits_per_byte:.4f} bits per byte")
    return 0


def import_(args, rest: list[str]) -> int:
    """Make a run directory of a published checkpoint."""
    values, problems = read_overrides(rest)
    problems += [f"{name}: import takes fields of the mesh alone" for name in values if not name.startswith("mesh.")]
    if problems:
        raise UserError(*problems)
    mesh = Config().replace(values).mesh
    if args.simulate is not None:
        use_cpu_devices(args.simulate)
    from k2jax.interop.hf import import_hf
    from k2jax.sharding.mesh import make_mesh, single_device_mesh

    to = args.to or str(Path("runs") / Path(args.folder).resolve().name)
    import_hf(args.folder, to, make_mesh(mesh) if rest or args.simulate else single_device_mesh(), args.drop_mtp)
    known = (Path(to) / "tokenizer").is_dir()
    use = f"continue a text with: k2jax generate {to} PROMPT" if known else "it brought no tokenizer, so no text"
    print(f"{to}: imported; {use}")
    return 0


def export(args, rest: list[str]) -> int:
    """Write a checkpoint for other libraries."""
    from k2jax.interop.export import export_run

    step = export_run(args.run, args.to, args.dtype, args.step, args.rope)
    known = (Path(args.run) / "tokenizer").is_dir()
    print(f"{args.to}: step {step} of {args.run}, {args.dtype}{'' if known else '; without a tokenizer, as the run'}")
    return 0


def plot(args, rest: list[str]) -> int:
    from k2jax.train.plot import plot_runs

    plot_runs(args.run, args.out)
    print(args.out)
    return 0
