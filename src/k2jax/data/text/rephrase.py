"""Rewritten variants of documents, by a language model behind an OpenAI-compatible endpoint.

As in K2's report (arXiv 2507.20534, 2.2): prompts of different style and perspective, a long document chunk by chunk
with the chunks rewritten before as context, and a check of every chunk against its source. A variant carries its
source's name and sha256 as `origin`, so that `k2jax prepare` puts both on the same side of the split, and so that a
mixture knows what it repeats.

What the endpoint answered is kept by (model, prompt with the text, temperature, attempt) in the output folder: the same
command again asks only what is not there, and ends in the same files as one that never stopped.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from k2jax.data.text.endpoint import Endpoint, NoAnswer
from k2jax.data.text.faithfulness import question, quick_check, verdict
from k2jax.data.text.readers import Record, choose_files, records
from k2jax.data.text.sources import Tally, path_problems, refuse_bad
from k2jax.errors import RunFailed, UserError
from k2jax.files import is_url, locked, parse_json, read_small, write_atomic
from k2jax.words import counted

_TEMPERATURE = 0.7
_ATTEMPTS = 2  # of one chunk, before its variant is given up
_CONTEXT_CHUNKS = 2
_MOST_FAILED = 8  # documents in a row without an answer, before the run stops
_RULES = (
    "Rewrite the text that follows <text> in that way. Keep every fact, figure, name, formula and code; add nothing "
    "that it does not say. It may be one part of a longer document; what was rewritten of it before stands in <before> "
    "and is not to be repeated. Answer with the rewritten text alone."
)


class Style(NamedTuple):
    name: str
    prompt: str
    same_language: bool = True  # False: a translation, whose words need not be the source's


STYLES = (
    Style("encyclopedia", "You write entries of an encyclopedia: neutral, dense, well ordered."),
    Style("textbook", "You write a textbook for students: each idea is introduced, explained and connected."),
    Style("notes", "You write learning notes, as someone who works through the material and keeps each step."),
    Style("dialogue", "You write a dialogue in which a curious reader asks and an expert answers."),
    Style("plain", "You write for a general reader: short sentences, plain words, the same content."),
)


class Options(NamedTuple):
    variants: int  # at most, per document
    styles: tuple[Style, ...]
    chunk_chars: int
    text_field: str
    min_chars: int


def read_styles(path: str) -> tuple[Style, ...]:
    """The styles of a JSON file: [{"name": ..., "prompt": ..., "same_language": true}, ...]. UserError for another."""
    form = 'must be [{"name": "plain", "prompt": "You write ...", "same_language": true}, ...], each name once'
    try:
        values = parse_json(path, read_small(Path(path), follow_links=True), form)
        styles = tuple(Style(**value) for value in values)
        fits = all(
            isinstance(s.name, str) and isinstance(s.prompt, str) and isinstance(s.same_language, bool) for s in styles
        )
        if not styles or not fits or len({style.name for style in styles}) < len(styles):
            raise ValueError("a name twice, or a value of another type")
    except UserError as error:
        raise UserError(f"--styles {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"--styles {path}: {form} ({error})") from None
    return styles


def chunks_of(text: str, chunk_chars: int) -> list[str]:
    """Consecutive parts of at most `chunk_chars` characters, cut between paragraphs, lines, sentences or words."""
    chunks, start = [], 0
    while len(text) - start > chunk_chars:
        window = text[start : start + chunk_chars]
        for border in (r"\n\s*\n", r"\n", r"[.!?。！？]\s*", r"\s"):
            ends = [match.end() for match in re.finditer(border, window) if match.end() > chunk_chars // 2]
            if ends:
                break
        stop = start + (ends[-1] if ends else chunk_chars)
        chunks.append(text[start:stop])
        start = stop
    return [chunk for chunk in [*chunks, text[start:]] if chunk.strip()]


def _messages(style: Style, chunk: str, rewritten: list[str]) -> list[dict]:
    before = "\n\n".join(rewritten[-_CONTEXT_CHUNKS:])
    context = f"<before>\n{before}\n</before>\n\n" if before else ""
    system = {"role": "system", "content": f"{style.prompt}\n\n{_RULES}"}
    return [system, {"role": "user", "content": f"{context}<text>\n{chunk}\n</text>"}]


def _rewrite(endpoint: Endpoint, style: Style, chunk: str, rewritten: list[str]) -> tuple[str | None, str | None]:
    """(text, None), or (None, what was wrong with the last attempt)."""
    for attempt in range(_ATTEMPTS):
        answer = endpoint.ask(_messages(style, chunk, rewritten), _TEMPERATURE, attempt)
        text = answer.text.strip()
        problem = quick_check(chunk, text, style.same_language) if answer.finished else "length: cut off"
        problem = problem or verdict(endpoint.ask(question(chunk, text), 0.0).text)
        if problem is None:
            return text, None
    return None, problem


def _variant(endpoint: Endpoint, style: Style, chunks: list[str]) -> tuple[str | None, str | None]:
    rewritten = []
    for chunk in chunks:
        text, problem = _rewrite(endpoint, style, chunk, rewritten)
        if text is None:
            return None, problem
        rewritten.append(text)
    return "\n\n".join(rewritten), None


def _variants(endpoint: Endpoint, options: Options, record: Record) -> list[tuple[Style, str | None, str | None]]:
    """(style, text, problem) for each variant; the styles rotate by the document's content, whatever the order."""
    first = int.from_bytes(hashlib.sha256(record.text.encode()).digest()[:8], "big")
    styles = [options.styles[(first + i) % len(options.styles)] for i in range(options.variants)]
    chunks, found = chunks_of(record.text, options.chunk_chars), []
    for style in styles:
        try:
            found.append((style, *_variant(endpoint, style, chunks)))
        except NoAnswer as error:
            found.append((style, None, f"no answer: {error}"))
    return found


def _in_order(function: Callable, items: Iterator, num_threads: int) -> Iterator:
    """(item, function(item)) in order, with up to twice `num_threads` begun."""
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)
    begun = collections.deque()
    try:
        for item in items:
            begun.append((item, pool.submit(function, item)))
            if len(begun) >= 2 * num_threads:
                done = begun.popleft()
                yield done[0], done[1].result()
        while begun:
            done = begun.popleft()
            yield done[0], done[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with locked(out.resolve(), os.O_RDONLY) as descriptor:
        if descriptor is None:
            raise UserError(f"--out {str(out)!r}: another rephrase is writing it; wait for it, or name another")
        yield


def _problems(specs: list[str], out: Path, url: str, options: Options, parallel: int, timeout: float, retries: int):
    yield from path_problems(specs)
    if is_url(out):
        yield f"--out {str(out)!r}: must be a folder, not a URL"
    elif str(out).startswith("~"):
        yield f"--out {str(out)!r}: ~ is not expanded here; nearest: {os.path.expanduser(out)!r}"
    elif out.exists() and not (out.is_dir() and ((out / "answers.sqlite").exists() or not any(out.iterdir()))):
        yield f"--out {str(out)!r}: exists and is not a folder of an earlier rephrase; name a new one"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        yield f"--url {url!r}: must be like http://localhost:8000/v1"
    if not 1 <= options.variants <= len(options.styles):
        yield f"--variants {options.variants}: must be at least 1 and at most the {len(options.styles)} styles"
    for name, value, least in (
        ("chunk-chars", options.chunk_chars, 200),
        ("parallel", parallel, 1),
        ("retries", retries, 0),
        ("min-chars", options.min_chars, 1),
    ):
        if value < least:
            yield f"--{name} {value}: must be at least {least}"
    if not timeout > 0:
        yield f"--timeout {timeout}: must be above 0 seconds"


def _documents(files, options: Options, left_out: Tally, bad: Tally) -> Iterator[tuple[str, Record]]:
    """(source, record), each text once. Variants are not rephrased again."""
    seen = set()
    for file in files:
        for record in records(file, options.text_field, left_out, bad):
            digest = hashlib.sha256(record.text.encode("utf-8", "surrogatepass")).digest()
            if len(record.text.strip()) < options.min_chars:
                left_out.add(f"below {options.min_chars} characters", record.name)
            elif record.origin is not None:
                left_out.add("a variant already", record.name)
            elif not record.text.isascii() and re.search("[\ud800-\udfff]", record.text):
                left_out.add("not UTF-8", record.name)
            elif digest in seen:
                left_out.add("duplicate", record.name)
            else:
                seen.add(digest)
                yield file.source, record


def _line(source: str, record: Record, style: Style, model: str, text: str) -> str:
    digest = hashlib.sha256(record.text.encode()).hexdigest()
    origin = {"source": source, "name": record.name, "sha256": digest}
    value = {"text": text, "origin": origin, "style": style.name, "model": model}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write_variants(file, endpoint, options: Options, documents, parallel: int, rejected: Tally, progress) -> dict:
    """Write what passes, count the rest; RunFailed if nothing is answered any more."""
    counts, failed = {"documents": 0, "variants": 0}, 0

    def work(document: tuple[str, Record]) -> list:
        return _variants(endpoint, options, document[1])

    for (source, record), found in _in_order(work, documents, parallel):
        counts["documents"] += 1
        for style, text, problem in found:
            if text is None:
                rejected.add(problem.partition(": http")[0], f"{record.name} ({style.name})")
            else:
                counts["variants"] += 1
                file.write(_line(source, record, style, endpoint.model, text))
        no_answer = [p for _, _, p in found if p and p.startswith("no answer")]
        failed = failed + 1 if len(no_answer) == len(found) else 0
        if failed == _MOST_FAILED:
            raise RunFailed(f"{counted(failed, 'document')} in a row: {no_answer[-1]}; the same command continues from here")
        if progress:
            progress(counts["documents"], counts["variants"], endpoint.num_requests)
    return counts


def rephrase(
    specs: list[str],
    out: str,
    url: str,
    model: str,
    *,
    key: str | None = None,
    variants: int = 2,
    styles: tuple[Style, ...] = STYLES,
    chunk_chars: int = 4000,
    min_chars: int = 200,
    parallel: int = 8,
    timeout: float = 120.0,
    retries: int = 4,
    pattern: str = "**/*",
    exclude: tuple[str, ...] = (),
    text_field: str = "text",
    skip_bad_lines: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict:
    """Write `out`/variants.jsonl, at most `variants` per document, and `out`/report.json; returns the report.

    skip_bad_lines: lines that may be left out because they cannot be read; more are an error. progress: called with
    documents, variants and requests so far. Raises UserError for arguments, bad lines and an endpoint that refuses,
    RunFailed if it stops answering; what was answered is kept, and the same call goes on.
    """
    folder, options = Path(out), Options(variants, styles, chunk_chars, text_field, min_chars)
    problems = [*_problems(specs, folder, url, options, parallel, timeout, retries)]
    if skip_bad_lines < 0:
        problems.append(f"--skip-bad-lines {skip_bad_lines}: must be at least 0")
    if problems:
        raise UserError(*problems)
    left_out, rejected, bad = Tally(), Tally(), Tally(num_examples=10)
    files = choose_files(specs, pattern, exclude, text_field, left_out)
    with _only_writer(folder), contextlib.ExitStack() as stack:
        endpoint = Endpoint(url, model, key, folder / "answers.sqlite", timeout=timeout, retries=retries)
        stack.callback(endpoint.close)
        file = stack.enter_context(open(folder / "variants.jsonl.partial", "w", encoding="utf-8"))
        documents = _documents(files, options, left_out, bad)
        counts = _write_variants(file, endpoint, options, documents, parallel, rejected, progress)
        refuse_bad(bad, skip_bad_lines)
        left_out.merge({f"bad {reason}": entry for reason, entry in bad.reasons.items()})
        file.flush()
        os.fsync(file.fileno())
        os.replace(folder / "variants.jsonl.partial", folder / "variants.jsonl")
        report = {**counts, "rejected": rejected.reasons, "left_out": left_out.reasons}
        write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
        return {**report, "requests": endpoint.num_requests, "cached": endpoint.num_cached}
