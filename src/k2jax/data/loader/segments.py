"""The segments of a run, from its first row to its last, settled and checked before it begins."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from k2jax.config import Config
from k2jax.config_rules import MAX_WEIGHTS, read_shares
from k2jax.data.loader.batches import num_windows, too_few_validation
from k2jax.data.loader.corpus import Corpus, make_cut
from k2jax.data.loader.timeline import Timeline, make_timeline
from k2jax.errors import UserError
from k2jax.files import read_sealed, write_sealed
from k2jax.words import counted

# What of a segment has to be the same for it to be the same mixture; the stores may move, their digests cover the rest.
_SAME = ("digest", "sources", "phases")


def _natural(windows: dict[str, int]) -> dict[str, int]:
    """Integer weights as the sources' sizes, exact up to a million windows, else by largest remainder."""
    total = sum(windows.values())
    parts = min(total, MAX_WEIGHTS)
    exact = {name: parts * count for name, count in windows.items()}
    shares = {name: value // total for name, value in exact.items()}
    rest = sorted(windows, key=lambda name: (-(exact[name] % total), name))
    for name in rest[: parts - sum(shares.values())]:
        shares[name] += 1
    divisor = math.gcd(*shares.values())
    return {name: share // divisor for name, share in shares.items()}


def _natural_problems(segment: dict) -> Iterator[str]:
    """Sources so small beside the others that no weight is as small: one in a million rows would repeat them often."""
    windows = {name: entry["windows"] for name, entry in segment["sources"].items()}
    total = sum(windows.values())
    for name, count in windows.items():
        if count * MAX_WEIGHTS < total:
            rule = f"less than a {MAX_WEIGHTS:,}th, the least weight; write the weights out"
            yield f"mixture: 'natural': source {name!r} has {count:,} of {counted(total, 'window')}, {rule}"


def _unread_problems(segment: dict, corpus: Corpus, config: Config) -> Iterator[str]:
    """Sources without a whole sequence, which 'natural' would pass over."""
    windows = {name: entry["windows"] for name, entry in segment["sources"].items()}
    rest = " ".join(f"{name}={share}" for name, share in _natural(windows).items())
    for name, stream in corpus.streams["train"].items():
        if name not in windows:
            rule = f"no whole row of data.sequence_length + 1 = {config.data.sequence_length + 1}"
            mend = f"lower that, or leave the source out by mixture.weights = {rest!r}"
            yield f"mixture: 'natural': source {name!r} has {counted(stream.num_tokens, 'token')}, and {rule}; {mend}"


def make_segment(corpus: Corpus, config: Config) -> dict:
    """The segment of a run that begins with step 0 and follows the config to the end."""
    cuts = {name: make_cut(corpus.store_of[name], config, name) for name in sorted(corpus.streams["train"])}
    windows = {name: cut.num_windows for name, cut in cuts.items() if cut.num_windows}
    epochs = read_shares(config.mixture.epochs) if config.mixture.epochs else {}
    weights, starts = config.mixture.weights, config.phases.start_tokens
    texts = weights * len(starts) if len(weights) == 1 else weights
    shares = [_natural(windows) if text == "natural" else read_shares(text) for text in texts]
    return {
        "from_step": 0,
        "path": config.data.path,
        "digest": corpus.digest,
        "sources": {
            name: {
                "windows": count,
                "epochs": epochs.get(name),
                "store": corpus.store_of[name].digest,
                "packing": cuts[name].digest,
            }
            for name, count in windows.items()
        },
        "phases": [list(pair) for pair in zip(starts, shares, strict=True)],
        "validation_fractions": {name: corpus.store_of[name].validation_fraction for name in windows},
    }


def _differences(old: dict, new: dict) -> Iterator[str]:
    if old["digest"] != new["digest"]:
        yield f"the stores: {old['path']} with digest {old['digest']} -> {new['path']} with digest {new['digest']}"
    for name in sorted({*old["sources"], *new["sources"]}):
        if (a := old["sources"].get(name)) != (b := new["sources"].get(name)):
            yield f"source {name}: {a} -> {b}"
    for (start, a), (_, b) in zip(old["phases"], new["phases"], strict=True):
        if a != b:
            yield f"weights from {start:,} tokens on: {a} -> {b}"


def continue_segments(past: list[dict], segment: dict, step: int, change: bool) -> tuple[list[dict], list[str]]:
    """(the segments of a run that goes on from `step` with `segment`, what changed).

    past: the segments so far, [] for a new run. UserError with the differences unless `change` allows them. The steps
    before `step` keep what they had.
    """
    if not past:
        return [segment], []
    if all(past[-1][key] == segment[key] for key in _SAME):
        return [*past[:-1], past[-1] | {"path": segment["path"]}], []
    changes = [*_differences(past[-1], segment)]
    if not change:
        rule = "give --change-mixture to change it from here on, or restore it"
        raise UserError(*(f"mixture: the run has another, {text}; {rule}" for text in changes))
    kept = [part for part in past if part["from_step"] < step]
    return [*kept, segment | {"from_step": step}], [f"mixture changed from step {step} on: {text}" for text in changes]


def _unknown_sources(segment: dict, config: Config) -> Iterator[str]:
    known = segment["sources"]
    for text in [*([config.mixture.epochs] if config.mixture.epochs else []), *config.mixture.weights]:
        for name in read_shares(text) if text != "natural" else ():
            if name not in known:
                there = ", ".join(known) or "none"
                yield f"mixture: {text!r}: data.path has no source {name!r} with a whole sequence; there are: {there}"


def _repeat_problems(used: dict[str, float], corpus: Corpus, limit: int | None) -> Iterator[str]:
    """Problems of documents that are seen, with their variants, more often than allowed. used: passes by source."""
    for name in used if limit is not None else ():
        derived = {n: s["variants"] for n, s in corpus.sources.items() if s["derived_from"] == name}
        seen = math.ceil(used[name]) + sum(math.ceil(used.get(n, 0)) * count for n, count in derived.items())
        if seen > limit:
            parts = [f"{n} {used.get(n, 0):.3f} times" for n in (name, *derived)]
            yield (
                f"mixture.max_repeats = {limit}: the run shows a document of {name} up to {seen} times, with its "
                f"variants ({', '.join(parts)}); give at least {seen}, or lower their weights"
            )


def _last_step(timeline: Timeline, steps: int, source: int, rows: int) -> int:
    """The most steps, up to `steps`, that need no more than so many rows of a source."""
    low = 0
    while low < steps:
        middle = (low + steps + 1) // 2
        fits = timeline.counts(timeline.rows_before(middle))[source] <= rows
        low, steps = (middle, steps) if fits else (low, middle - 1)
    return low


def mixture_problems(timeline: Timeline, corpus: Corpus, config: Config) -> Iterator[str]:
    """Sources that would run out, by the run's arithmetic to its last step."""
    known = timeline.segments[-1]["sources"]
    rows = timeline.counts(timeline.rows_before(config.train.num_steps))
    for number, (name, store) in enumerate(timeline.keys):
        count, size = int(rows[number]), int(timeline.windows[number])
        if known.get(name, {}).get("store") != store or (limit := known[name]["epochs"]) is None:
            continue
        if count > limit * size:
            longest = _last_step(timeline, config.train.num_steps, number, limit * size)
            yield (
                f"mixture.epochs: {name} runs out: the run needs {count:,} of its rows, but {name}={limit} over "
                f"{size:,} windows gives {limit * size:,}; give {name}={-(-count // size)}, lower its weight, or set "
                f"train.num_steps to at most {longest}"
            )
    used = {name: float(count / size) for name, count, size in zip(timeline.names, rows, timeline.windows, strict=True)}
    yield from _repeat_problems(used, corpus, config.mixture.max_repeats)


def _leak_problems(timeline: Timeline, corpus: Corpus, config: Config, step: int) -> Iterator[str]:
    """Problems of documents that were trained on in the first `step` steps and would now be held out."""
    if config.data.validation_path is not None:
        return
    rows = timeline.counts(timeline.rows_before(step))
    read = {key for key, count in zip(timeline.keys, rows, strict=True) if count}
    trained = [
        (fraction, name, part["path"])
        for part in timeline.segments
        for name, fraction in part.get("validation_fractions", {}).items()  # of which older plans know nothing
        if fraction is not None and (name, part["sources"][name]["store"]) in read
    ]
    least, name, path = min(trained, default=(1, None, None))
    for store in corpus.stores:
        if store.validation_fraction is not None and store.validation_fraction > least:
            found = f"{store.path} has {store.validation_fraction} and source {name!r} of {path} had {least}"
            rule = f"a document that was trained on in the first {counted(step, 'step')} would be held out from now on"
            mend = f"prepare it with at most {least}, or give held-out text as data.validation_path"
            yield f"data.path: validation_fraction grows, {found}: {rule}; {mend}"


def settle_timeline(
    corpus: Corpus, config: Config, past: list[dict] = (), step: int = 0, change: bool = False
) -> tuple[Timeline, list[str]]:
    """(the timeline of a run that goes on from `step`, changes of its mixture); past, change: see `continue_segments`.

    UserError with everything that makes the stores unfit for the run, and a mixture that they do not last for.
    """
    length, problems = config.data.sequence_length, []
    if corpus.vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size = {config.model.vocab_size}: must be at least {corpus.vocab_size}, the ids of the "
            f"tokenizer of data.path = {corpus.path!r}"
        )
    if not num_windows(corpus, "train", length):
        tokens = max((stream.num_tokens for stream in corpus.streams["train"].values()), default=0)
        most = f"at most {tokens - 1} fits" if tokens > 1 else "it has no sequence at all"
        problems.append(
            f"data.sequence_length = {length}: must be below the {counted(tokens, 'token')} of the training split of data.path = "
            f"{corpus.path!r}; {most}"
        )
        segment = None
    else:
        segment = make_segment(corpus, config)
        problems += _unknown_sources(segment, config)
        if "natural" in config.mixture.weights:
            problems += [*_natural_problems(segment), *_unread_problems(segment, corpus, config)]
    if not problems:
        segments, notes = continue_segments(list(past), segment, step, change)
        timeline = make_timeline(segments, config)
        problems += [*mixture_problems(timeline, corpus, config), *_leak_problems(timeline, corpus, config, step)]
    available = num_windows(corpus, "validation", length)
    problems += too_few_validation(available, config.train.eval_sequences, "train.eval_sequences")
    if problems:
        raise UserError(*problems)
    return timeline, notes


def describe_mixture(timeline: Timeline, config: Config) -> str:
    """For the start banner: how often the run reads each source, from its first step to its last."""
    rows = timeline.counts(timeline.rows_before(config.train.num_steps))
    used = zip(timeline.names, rows / timeline.windows, rows / max(1, rows.sum()), strict=True)
    return "mixture    " + ", ".join(f"{name} {share:.2%}, {passes:.3g} passes" for name, passes, share in used)


def read_segments(path: Path) -> list[dict]:
    """The segments (data/loader/timeline.py) of a run, from its timeline.json; [] for one that has not begun."""
    return read_sealed(path)["segments"] if os.path.lexists(path) else []


def write_segments(path: Path, segments: list[dict]) -> None:
    write_sealed(path, {"segments": segments})


def segment_paths(segments: list[dict]) -> str:
    """All stores that any segment reads, joined by commas."""
    return ",".join(dict.fromkeys(path for part in segments for path in part["path"].split(",")))
