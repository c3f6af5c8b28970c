"""`k2jax generate`, `eval`, `import` and `export`."""

import dataclasses
import json
import sys
from pathlib import Path

from k2jax import processes
from k2jax.cli.overrides import read_overrides
from k2jax.cli.run import before_joining, join_processes
from k2jax.config import Config, MeshConfig
from k2jax.errors import UserError
from k2jax.launch.distributed import use_cpu_devices
from k2jax.runs.folder import RunFolder, is_published


def _mesh_sizes(args) -> MeshConfig | None:
    """Of the options --mesh.AXIS; None in a process that is alone and was given none: one device."""
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = {axis: size for axis in axes if (size := getattr(args, f"mesh.{axis}")) is not None}
    return MeshConfig(**sizes) if sizes or args.simulate is not None or processes.count() > 1 else None


def _print_and_leave(text: str) -> int:
    """End the command, of many processes in all of them: the first prints."""
    first = processes.is_first()
    processes.leave()
    if first:
        print(text)
    return 0


def _load(args, decodes: bool):
    """The model of a run, or of a published checkpoint's folder, on the mesh of the options.

    decodes: whether it is to generate, which excludes mesh.context.
    """
    join_processes(args)
    sizes = _mesh_sizes(args)
    from k2jax.inference.load import load_run
    from k2jax.inference.mesh import DECODING_AXES, SCORING_AXES

    axes = DECODING_AXES if decodes else SCORING_AXES
    if is_published(Path(args.run)):
        if args.step is not None:
            raise UserError(f"--step {args.step}: {args.run} is a published checkpoint, which has no steps")
        from k2jax.interop.hf import load_published

        loaded = load_published(args.run, sizes=sizes, axes=axes)
    else:
        loaded = load_run(args.run, args.step, sizes, axes)
    if sizes is not None and processes.is_first():
        print(f"on {loaded.describe()}", file=sys.stderr)
    return loaded


def generate(args, rest: list[str]) -> int:
    """Print each prompt with its continuation."""
    from k2jax.inference import generate as generation

    with before_joining(args):
        generation.check_sampling(args.tokens, args.temperature, args.seed)
    texts = generation.generate(_load(args, decodes=True), args.prompt, args.tokens, args.temperature, args.seed)
    return _print_and_leave("\n---\n".join(prompt + text for prompt, text in zip(args.prompt, texts, strict=True)))


def evaluate(args, rest: list[str]) -> int:
    """Perplexity on a held-out split, or tasks of the evaluation harness."""
    others = ("data", "source", "sequences", "length") if args.tasks else ("task_folder", "limit")
    where = "does not go with --tasks" if args.tasks else "goes with --tasks alone"
    problems = [f"--{n.replace('_', '-')}: {where}" for n in others if getattr(args, n) is not None]
    if args.limit is not None and args.limit < 1:
        problems.append(f"--limit {args.limit}: must be at least 1")
    if problems:
        with before_joining(args):
            raise UserError(*problems)
    if args.tasks:
        from k2jax.inference.lm_eval import run_tasks

        results, shortened = run_tasks(_load(args, decodes=True), args.tasks.split(","), args.task_folder, args.limit)
        found = {"results": results, "requests_shortened": shortened}
        return _print_and_leave(json.dumps(found, indent=2, default=str))
    from k2jax.data.loader.corpus import open_corpus, open_data
    from k2jax.inference.evaluate import perplexity

    loaded = _load(args, decodes=False)
    data = loaded.config.data
    if args.data is None and "://" not in data.path and not any(Path(path).exists() for path in data.path.split(",")):
        raise UserError(f"{args.run}: its token store, {data.path!r}, is not here; give --data STORE")
    corpus = open_data(loaded.config) if args.data is None else open_corpus(args.data, data.tokenizer, data.index_dir)
    found = perplexity(loaded, corpus, args.sequences, args.length, args.source)
    if args.json:
        return _print_and_leave(json.dumps(found._asdict(), indent=2))
    nats = f"{found.nats_per_token:.4f} nats per token"
    text = f"perplexity {found.perplexity:.4f} ({nats}) over {found.tokens:,} tokens"
    return _print_and_leave(f"{text}\n{found.bits_per_byte:.4f} bits per byte")


def import_(args, rest: list[str]) -> int:
    """Make a run directory from a published checkpoint."""
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
    known = RunFolder(Path(to)).tokenizer.is_dir()
    use = f"continue a text with: k2jax generate {to} PROMPT" if known else "it brought no tokenizer, so no text"
    print(f"{to}: imported; {use}")
    return 0


def export(args, rest: list[str]) -> int:
    """Write a checkpoint for other libraries."""
    from k2jax.interop.export import export_run
    from k2jax.runs.mirror import run_folder

    step = export_run(args.run, args.to, args.dtype, args.step, args.rope)
    known = run_folder(args.run).tokenizer.is_dir()
    print(f"{args.to}: step {step} of {args.run}, {args.dtype}{'' if known else '; without a tokenizer, as the run'}")
    return 0
