"""`k2jax prepare` and `rephrase`, and what they show while they run."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from k2jax.errors import UserError
from k2jax.words import counted

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


def _rates(p) -> str:
    """Documents and tokens per second of this run, and how long the rest takes at this rate."""
    documents, _, tokens, file_bytes = (
        now - then for now, then in zip((p.documents, p.text_bytes, p.tokens, p.file_bytes[0]), p.before, strict=True)
    )
    seconds = max(p.seconds, 1e-9)
    shown = [f"{documents / seconds:,.0f} documents/s"] if documents else []
    shown += [f"{tokens / seconds:,.0f} tokens/s"] if tokens else []
    if file_bytes > 0:
        left = (p.file_bytes[1] - p.file_bytes[0]) * seconds / file_bytes
        shown.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
    return ", ".join(shown)


def _share(p) -> float:
    done, total = p.file_bytes if p.file_bytes[0] else p.ranks
    return done / total if total else 1.0


@contextmanager
def _progress_bars(console) -> Iterator[Callable]:
    """A bar per task; without a terminal, a line every ten seconds."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    bars, ids, last = Progress(*columns, console=console), {}, [time.monotonic()]

    def show(p) -> None:
        if console.is_terminal:
            if p.task not in ids:
                ids[p.task] = bars.add_task(p.task, total=1.0, rates="")
            bars.update(ids[p.task], completed=_share(p), rates=_rates(p))
        elif time.monotonic() - last[0] > _SECONDS_BETWEEN_LINES:
            last[0] = time.monotonic()
            console.print(f"{p.task}: {_share(p):.0%}, {counted(p.documents, 'document')}, {_rates(p)}", markup=False)

    if not console.is_terminal:
        yield show
        return
    with bars:
        yield show


def _task_table(tasks: dict):
    from rich.table import Table

    table = Table("task", "documents", "MB", "CPU s", "MB per CPU s", "of which", box=None)
    for name, cost in tasks.items():
        size, seconds = cost["text_bytes"] / 1e6, cost["cpu_seconds"]
        rate = f"{size / seconds:,.1f}" if size and seconds else ""
        parts = ", ".join(f"{part} {taken:,.1f} s" for part, taken in cost["parts"].items() if taken >= 0.05)
        if "unreadable" in cost:
            parts += f"{', ' if parts else ''}without {cost['unreadable']} ranks, whose reports are damaged"
        table.add_row(name, f"{cost['documents'] or '':,}" if cost["documents"] else "", f"{size:,.1f}" if size else "",
                      f"{seconds:,.1f}", rate, parts)  # fmt: skip
    return table


def _options(pairs: list[str]) -> dict[str, str]:
    problems = [f"--executor-option {pair!r}: must be KEY=VALUE" for pair in pairs if "=" not in pair]
    if problems:
        raise UserError(*problems)
    return dict(pair.split("=", 1) for pair in pairs)


def prepare(args, rest: list[str]) -> int:
    from rich.console import Console

    from k2jax.data.text import prepare as preparation

    console = Console(soft_wrap=True, highlight=False)
    options = _options(args.executor_option)
    try:
        with _progress_bars(console) as progress:
            summary = preparation.prepare(
                args.source, args.out, args.tokenizer, pattern=args.pattern, exclude=args.exclude,
                validation_fraction=args.validation_fraction, text_field=args.text_field,
                skip_bad_lines=args.skip_bad_lines, min_chars=args.min_chars,
                max_chars=args.max_chars, filters=args.filter, near_duplicates=args.near_duplicates,
                executor=args.executor, workers=args.workers, executor_options=options, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        raise
    for reason, entry in summary["skipped"].items():
        console.print(
            f"left out, {reason}: {entry['count']:,} (such as {', '.join(entry['examples'][:2])})", markup=False
        )
    console.print(_task_table(summary["tasks"]))
    for split, counts in summary["splits"].items():
        text = f"{counts['documents']:,} documents, {counts['text_bytes']:,} bytes, {counts['tokens']:,} tokens"
        console.print(f"{split}: {text}", markup=False)
    vocabulary = summary["tokenizer"]["vocab_size"]
    console.print(f"token store: {args.out} (model.vocab_size must be at least {vocabulary:,})", markup=False)
    return 0


def rephrase(args, rest: list[str]) -> int:
    from rich.console import Console

    from k2jax.data.text import rephrase as rephrasing

    console = Console(soft_wrap=True, highlight=False)
    styles = rephrasing.read_styles(args.styles) if args.styles else rephrasing.STYLES
    with console.status("asking ...") as status:
        report = rephrasing.rephrase(
            args.source, args.out, args.url, args.model, key=os.environ.get(args.key_from), variants=args.variants,
            styles=styles, chunk_chars=args.chunk_chars, min_chars=args.min_chars, parallel=args.parallel,
            timeout=args.timeout, retries=args.retries, pattern=args.pattern, exclude=tuple(args.exclude),
            text_field=args.text_field, skip_bad_lines=args.skip_bad_lines,
            progress=lambda *done: status.update(", ".join(map(counted, done, ("document", "variant", "request")))),
        )  # fmt: skip
    for what in ("left_out", "rejected"):
        for reason, entry in report[what].items():
            examples = ", ".join(entry["examples"][:2])
            console.print(f"{what.replace('_', ' ')}, {reason}: {entry['count']:,} (such as {examples})", markup=False)
    asked = f"{report['requests']:,} requests, {report['cached']:,} answers from before"
    console.print(f"{report['variants']:,} variants of {report['documents']:,} documents; {asked}", markup=False)
    how = "prepare it beside its source, as a source of its own, NAME-rephrased="
    console.print(f"{how}{args.out}/variants.jsonl", markup=False)
    return 0
