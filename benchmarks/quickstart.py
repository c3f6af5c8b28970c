"""Check what `make train` promises, and print the figures: python benchmarks/quickstart.py RUN UNCLIPPED_RUN

The run must have beaten a byte-bigram model counted on its whole training text, need the order of its context,
write words and statements of Python that are not copies, and have had its logits held by QK-Clip where the
unclipped run of the same seed lost them. Exits with 1 if one of these fails.
"""

import argparse
import ast
import itertools
import math
import re
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from k2jax.launch.distributed import use_cpu_devices

PROMPTS = ("import ", "class Server", "class Parser(", "def main(")


def decoded(corpus, split: str) -> bytes:
    """The text of a split as UTF-8, its documents one after the other."""
    tokenizer, parts = corpus.tokenizer(), []
    for stream in corpus.streams[split].values():
        borders = stream.borders(0, stream.num_documents).tolist()
        spans = itertools.pairwise(borders)
        parts += [tokenizer.decode(stream.read(start + 1, stop - 1)).encode() for start, stop in spans]
    return b"\n".join(parts)


def bigram_bits(training: bytes, held_out: bytes) -> float:
    """Bits per byte of the held-out text under a bigram model of the training text's bytes, counts + 0.01."""
    pairs = lambda text: text[:-1].astype(np.int64) * 256 + text[1:]  # noqa: E731
    train, held = (np.frombuffer(text, np.uint8) for text in (training, held_out))
    table = np.bincount(pairs(train), minlength=65536).reshape(256, 256) + 0.01
    return float(-np.log2(table / table.sum(1, keepdims=True)).ravel()[pairs(held)].mean())


def last_token_bits(run_dir: str, rows: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bits of each row's last token [n, T + 1], with the context before it as it is, and shuffled."""
    import jax
    import jax.numpy as jnp

    from k2jax.inference.load import load_run
    from k2jax.model.transformer import build_model

    loaded = load_run(run_dir)
    config, state = loaded.config, loaded.state

    @jax.jit
    def nats(tokens, targets):
        logits = build_model(config.model, state.params, state.router_bias, jnp.float32)(tokens).logits[:, -1]
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]

    shuffled = np.random.default_rng(seed).permuted(rows[:, :-1], axis=1)
    totals = [
        np.concatenate([nats(c[i : i + 16], rows[i : i + 16, -1]) for i in range(0, len(rows), 16)])
        for c in (rows[:, :-1], shuffled)
    ]
    return tuple(float(np.mean(t)) / math.log(2) for t in totals)


def most_common_share(ids: list[int]) -> float:
    """Share of a sample's most frequent token."""
    return max(Counter(ids).values()) / len(ids)


def known_words(text: str, training: bytes) -> float:
    """Share of a sample's words, names and keywords alike, that stand in the training text as words; 0 without any."""
    words = re.findall(r"[^\W\d]\w+", text)
    known = {word.decode() for word in re.findall(rb"[A-Za-z_]\w+", training)}
    return sum(word in known for word in words) / len(words) if words else 0.0


def kinds_of_statements(text: str, size: int = 8) -> set[str]:
    """The kinds of statement in the block of `size` consecutive lines that parses and has the most, docstrings aside.

    A block is dedented first, so that lines from inside a function count, and a block that ends in a header is tried
    with a body. A string or a name alone is a statement that anything parses as, so it is none here.
    """
    lines, best = text.splitlines(), set()
    for start in range(len(lines) - size + 1):
        block = textwrap.dedent("\n".join(lines[start : start + size]))
        for tail in (
            "",
            "\n" + " " * (len(lines[start + size - 1]) - len(lines[start + size - 1].lstrip()) + 4) + "pass",
        ):
            try:
                nodes = ast.walk(ast.parse(block + tail))
            except (SyntaxError, ValueError):
                continue
            trivial = lambda node: isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)  # noqa: E731
            found = {type(n).__name__ for n in nodes if isinstance(n, ast.stmt) and not trivial(n)} - {"Pass"}
            best = max(best, found, key=len)
    return best


def copied_lines(text: str, training: bytes, length: int = 60) -> list[str]:
    """Lines of the sample with `length` or more characters that stand in the training text as they are."""
    wanted = {line.strip().encode() for line in text.splitlines() if len(line.strip()) >= length}
    return sorted(line.decode() for line in wanted if line in training)


def clip_figures(records: list[dict], tau: float) -> dict:
    """First step with a clip, and the median and maximum of the largest logit from 20 steps after it."""
    first = next((r["step"] for r in records if r["heads_clipped"]), None)
    later = [r["max_logit"] / tau for r in records if first is not None and r["step"] >= first + 20]
    return {
        "first": first,
        "median": statistics.median(later) if later else math.nan,
        "max": max(later, default=math.nan),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("unclipped")
    parser.add_argument("--windows", type=int, default=256)
    args = parser.parse_args()
    use_cpu_devices(1)
    from k2jax.data.loader.batches import validation_batches
    from k2jax.data.loader.corpus import open_data
    from k2jax.inference.generate import generate
    from k2jax.inference.load import load_run
    from k2jax.report.curves import plot_runs, read_run

    config, records = read_run(args.run)
    _, unclipped = read_run(args.unclipped)
    corpus, tau = open_data(config), config.optim.qk_clip_tau

    def rows(count):
        return np.concatenate([b["tokens"] for b in validation_batches(corpus, config, count, 16)])

    training = decoded(corpus, "train")
    bigram = bigram_bits(training, decoded(corpus, "validation"))
    model = next(r["validation_bits_per_byte"] for r in reversed(records) if "validation_bits_per_byte" in r)
    intact, shuffled = last_token_bits(args.run, rows(args.windows))
    texts = generate(load_run(args.run), list(PROMPTS), 200, temperature=0.5, seed=3)
    sample = "\n\n".join(prompt + text for prompt, text in zip(PROMPTS, texts, strict=True))
    Path(args.run, "sample.txt").write_text(sample, encoding="utf-8")
    copies, kinds = copied_lines(sample, training), kinds_of_statements(sample)
    share = most_common_share(corpus.tokenizer().encode(sample).tolist())
    words = known_words(sample, training)
    clip, lost = clip_figures(records, tau), max(r["max_logit"] for r in unclipped) / tau
    picture = str(Path(args.run, "curves.png"))
    plot_runs([args.run, args.unclipped], picture)

    print(f"--- sample ({args.run}/sample.txt)\n{sample}\n---")
    checks = [
        (f"validation {model:.3f} bits per byte (bound 1.95), bigram of bytes {bigram:.3f}", model <= 1.95 < bigram),
        (f"last token {intact:.3f} bits, with its context shuffled {shuffled:.3f} (+{shuffled / intact - 1:.0%})",
         shuffled >= 1.2 * intact),
        (f"sample: its most frequent token is {share:.1%} of it", share <= 0.15),
        (f"sample: {words:.0%} of its words are words of the training text", words >= 0.6),
        (f"sample: 8 lines parse, with {', '.join(sorted(kinds)) or 'no statement'}", len(kinds) >= 2),
        (f"sample: {len(copies)} lines of 60 or more characters copied from the training text", not copies),
        (f"QK-Clip: first at step {clip['first']}; from 20 steps later max logit / tau: median {clip['median']:.3f}, "
         f"largest {clip['max']:.3f}", clip["median"] <= 1.05 and clip["max"] <= 1.5),
        (f"without clipping max logit / tau reaches {lost:.2f}", lost > 2),
        (f"picture: {picture}", Path(picture).stat().st_size > 10_000),
    ]  # fmt: skip
    for text, passed in checks:
        print(f"{'pass' if passed else 'FAIL'}  {text}")
    return 0 if all(passed for _, passed in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
