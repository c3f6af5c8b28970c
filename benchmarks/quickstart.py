"""Check what `make train` promises, and print the figures: python benchmarks/quickstart.py RUN UNCLIPPED_RUN

The run must have beaten a byte-bigram model counted on its whole training text, need the order of its context,
write text that Python's tokenizer reads and that is no copy, and have had its logits held by QK-Clip where the
unclipped run of the same seed lost them. Exits with 1 where one of these fails.
"""

import argparse
import io
import math
import statistics
import sys
import tokenize
from pathlib import Path

import numpy as np

from k2jax.launch.distributed import use_cpu_devices


def bigram_bits(corpus, rows: np.ndarray) -> float:
    """Bits per predicted token of rows [n, T + 1] under a bigram model of the training split, counts + 0.01."""
    size = corpus.vocab_size
    counts, chunk = np.zeros(size * size), 2**22
    for stream in corpus.streams["train"].values():
        for start in range(0, stream.num_tokens - 1, chunk):
            tokens = stream.read(start, min(start + chunk + 1, stream.num_tokens)).astype(np.int64)
            counts += np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size)
    table = counts.reshape(size, size) + 0.01
    bits = -np.log2(table / table.sum(1, keepdims=True))
    return float(bits[rows[:, :-1], rows[:, 1:]].mean())


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


def readable_lines(text: str) -> int:
    """Most consecutive lines of `text` that Python's tokenizer reads without an error."""
    lines = text.splitlines(keepends=True)
    best = 0
    for start in range(len(lines)):
        for end in range(start + best + 1, len(lines) + 1):
            try:
                list(tokenize.generate_tokens(io.StringIO("".join(lines[start:end])).readline))
            except (tokenize.TokenError, SyntaxError):
                continue  # a longer piece may close the bracket
            best = max(best, end - start)
    return best


def copied_lines(text: str, corpus, length: int = 60) -> list[str]:
    """Lines of the sample with `length` or more characters that stand in the training text as they are."""
    wanted = {line.strip().encode() for line in text.splitlines() if len(line.strip()) >= length}
    if not wanted:
        return []
    streams = [stream.read(0, stream.num_tokens) for stream in corpus.streams["train"].values()]
    training = [np.where(tokens < 256, tokens, 10).astype(np.uint8).tobytes() for tokens in streams]
    return sorted(line.decode() for line in wanted if any(line in text for text in training))


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
    parser.add_argument("--windows", type=int, default=512)
    args = parser.parse_args()
    use_cpu_devices(1)
    from k2jax.data.loader.batches import validation_batches
    from k2jax.data.loader.corpus import open_data
    from k2jax.inference.generate import generate
    from k2jax.inference.load import load_run
    from k2jax.report.curves import plot_runs, read_run
    from k2jax.train.validate import bits_per_byte

    config, records = read_run(args.run)
    _, unclipped = read_run(args.unclipped)
    corpus, tau = open_data(config), config.optim.qk_clip_tau

    def rows(count):
        return np.concatenate([b["tokens"] for b in validation_batches(corpus, config, count, 16)])

    bigram = bits_per_byte(bigram_bits(corpus, rows(config.train.eval_sequences)) * math.log(2), corpus)
    model = next(r["validation_bits_per_byte"] for r in reversed(records) if "validation_bits_per_byte" in r)
    intact, shuffled = last_token_bits(args.run, rows(args.windows))
    sample = generate(load_run(args.run), [""], 2000, temperature=0.7, seed=1)[0]
    Path(args.run, "sample.txt").write_text(sample, encoding="utf-8")
    copies, lines = copied_lines(sample, corpus), readable_lines(sample)
    clip, lost = clip_figures(records, tau), max(r["max_logit"] for r in unclipped) / tau
    picture = str(Path(args.run, "curves.png"))
    plot_runs([args.run, args.unclipped], picture)

    print(f"--- sample ({args.run}/sample.txt)\n{sample}\n---")
    checks = [
        (f"validation {model:.3f} bits per byte, bigram {bigram:.3f}", model < bigram),
        (f"last byte {intact:.3f} bits, with its context shuffled {shuffled:.3f} (+{shuffled / intact - 1:.0%})",
         shuffled >= 1.2 * intact),
        (f"sample: {lines} consecutive lines that Python's tokenizer reads", lines >= 10),
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
