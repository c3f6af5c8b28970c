"""The loader beside a Grain loader of ArrayRecord files, on the same tokens in the same run.

python benchmarks/loader.py [--tokens 67108864] [--batches 10000] [--rounds 5]

Sequences of 4,096 tokens in a random order from a local disk; the two sides take turns, figures are medians of the
rounds. The other side reads records of 4,097 tokens, one per group as its documentation advises for random access, and
gives tokens alone; ours gives documents' ids and positions too. Exits with 1 where a bound is missed.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import grain
import numpy as np
from measure import resident

from k2jax.config import Config
from k2jax.data.loader.batches import train_batches
from k2jax.data.loader.corpus import open_corpus
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.store.writer import PartWriter, merge_parts
from k2jax.data.tokenizer import load_tokenizer

LENGTH, BATCH, VOCAB = 4096, 64, 163_840


def make_tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 ids with the frequencies of words, borders of documents of about 1,000 tokens)."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.2, count), VOCAB - 1).astype(np.uint32)
    lengths = rng.lognormal(6.5, 0.9, count // 500).astype(np.int64) + 8
    borders = np.cumsum([0, *lengths])
    return tokens, np.append(borders[borders < count], count)


def write_store(folder: Path, tokens: np.ndarray, borders: np.ndarray) -> None:
    writer = PartWriter(folder, 0, load_tokenizer("byte"))
    for number, (start, stop) in enumerate(itertools.pairwise(borders.tolist())):
        record = {"name": str(number), "bytes": 0, "sha256": f"{number:064x}"}
        writer.append_tokens("validation" if number < 20 else "train", "text", tokens[start:stop], record)
    writer.finish()
    merge_parts(folder, 1, load_tokenizer("byte"))


def write_records(path: Path, tokens: np.ndarray) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for start in range(0, len(tokens) - LENGTH, LENGTH):
        writer.write(tokens[start : start + LENGTH + 1].tobytes())
    writer.close()


def our_batches(folder: Path, batch: int = BATCH, threads: int = 4):
    config = Config().replace(
        {"data.path": str(folder), "data.sequence_length": LENGTH, "data.batch_sequences": batch,
         "data.read_threads": threads, "data.prefetch_sequences": 4 * batch, "train.eval_sequences": 1}
    )  # fmt: skip
    corpus = open_corpus(str(folder))
    return train_batches(corpus, settle_timeline(corpus, config)[0], config, 0)


def record_batches(path: Path, threads: int = 4):
    source = grain.sources.ArrayRecordDataSource([str(path)])
    rows = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    rows = rows.map(lambda record: np.frombuffer(record, np.uint32).astype(np.int32))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * BATCH)
    return iter(rows.to_iter_dataset(options).batch(BATCH))


def rate(batches, count: int) -> tuple[float, float]:
    """(tokens per second, tokens per second of CPU time)."""
    started, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    tokens = count * BATCH * LENGTH
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - used)


def hand_off(batches, count: int, step_seconds: float) -> float:
    """Median milliseconds that a step of so many seconds waits for its batch."""
    waits = []
    for _ in range(count):
        time.sleep(step_seconds)
        started = time.perf_counter()
        next(batches)
        waits.append((time.perf_counter() - started) * 1e3)
    return float(np.median(waits[5:]))


def growth(folder: Path, count: int) -> tuple[float, float]:
    """MiB of the process after half of the batches, and after all."""
    batches, found = our_batches(folder, batch=8), []
    for number in range(count):
        next(batches)
        if number in (count // 2, count - 1):
            found.append(resident() / 2**20)
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**26)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, records = Path(folder) / "store", Path(folder) / "records"
        tokens, borders = make_tokens(args.tokens)
        write_store(store, tokens, borders)
        write_records(records, tokens)
        del tokens
        sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (store,)}
        print(f"store: {sizes[store] / 1e6:.0f} MB, records: {records.stat().st_size / 1e6:.0f} MB")
        ours, theirs = our_batches(store), record_batches(records)
        warm = args.tokens // LENGTH // BATCH  # one pass: every shard compared with its digest, every page read
        rate(ours, warm), rate(theirs, warm)
        pairs = [(rate(ours, 40), rate(theirs, 40)) for _ in range(args.rounds)]
        ours_wall, ours_cpu, theirs_wall, theirs_cpu = np.median([[*a, *b] for a, b in pairs], axis=0) / 1e6
        ratio = float(np.median([a[0] / b[0] for a, b in pairs]))
        print(f"ours: {ours_wall:.1f}M tokens/s, {ours_cpu:.1f}M per CPU second")
        print(f"ArrayRecord: {theirs_wall:.1f}M tokens/s, {theirs_cpu:.1f}M per CPU second; ours / theirs {ratio:.2f}")
        wait = hand_off(ours, 60, 0.1)
        print(f"hand-off: {wait:.3f} ms")
        half, whole = growth(store, args.batches)
        print(f"memory after half of {args.batches} batches and after all: {half:.0f}, {whole:.0f} MiB")
    sys.exit(0 if ours_wall > 20 and ratio >= 2 and wait < 1 and whole < 1.05 * half else 1)


if __name__ == "__main__":
    main()
