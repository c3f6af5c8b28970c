"""Batches as a pure function of (manifest, seed, step): no iterator state, so resume and auditing are arithmetic.

Dims: B sequences of a batch, T data.sequence_length. Window w of a split is its tokens [w*T, w*T + T]; neighbours
share one token, the last target of one being the first input of the next. Row g of the endless sequence of rows,
g = step * B + r, is window permute(g mod num_windows) under a key of its own for every pass over the data.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from k2jax.config import Config, DataConfig, UserError
from k2jax.data.permutation import permute
from k2jax.data.tokens import TokenStore

NUM_ROWS = 2**62  # more than any run reads; Grain wants a length


class Row(NamedTuple):
    """One sequence. Inputs are tokens[:-1], targets tokens[1:]."""

    tokens: np.ndarray  # int32 [T + 1]
    segment_ids: np.ndarray  # int32 [T]: document of each input, counted from 0 in the window
    positions: np.ndarray  # int32 [T]: tokens since the document began, or since the window did


def num_windows(store: TokenStore, split: str, sequence_length: int) -> int:
    """Whole windows in a split. The fewer than T tokens after the last are never read."""
    return max(0, store.num_tokens(split) - 1) // sequence_length


def read_row(store: TokenStore, split: str, sequence_length: int, window: int) -> Row:
    """Window `window` of a split, with its documents told apart."""
    start = window * sequence_length
    stop = start + sequence_length
    borders = store.borders(split)
    # The needles are uint64 like the borders: for int64 ones numpy would convert every border to float64.
    first, last = np.searchsorted(borders, np.array([start + 1, stop], np.uint64)) - [1, 0]
    starts = np.maximum(borders[first:last].astype(np.int64) - start, 0)
    lengths = np.diff(starts, append=sequence_length)
    segment_ids = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
    positions = np.arange(sequence_length, dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    return Row(store.read(split, start, stop + 1).astype(np.int32), segment_ids, positions)


def permutation_key(seed: int, epoch: int, split: str = "train") -> int:
    """64-bit key of the shuffle of one pass over a split."""
    name = f"k2jax permutation 1: seed {seed}, epoch {epoch}, {split}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def window_of_row(row: int, num_windows: int, seed: int) -> tuple[int, int]:
    """(epoch, window) of one global row of the training split."""
    epoch, index = divmod(row, num_windows)
    return epoch, permute(index, num_windows, permutation_key(seed, epoch))


def windows_of_rows(rows: np.ndarray, num_windows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`window_of_row` for integers of any shape: (epochs, windows), int64."""
    epochs, indices = np.divmod(np.asarray(rows, np.int64), num_windows)
    windows = np.empty_like(indices)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = permute(indices[here], num_windows, permutation_key(seed, int(epoch)))
    return epochs, windows


class _TrainRows:
    """Every row that training can ever ask for, by its global number."""

    def __init__(self, store: TokenStore, data: DataConfig):
        self.store, self.data = store, data
        self.num_windows = num_windows(store, "train", data.sequence_length)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        _, window = window_of_row(int(row), self.num_windows, self.data.seed)
        return read_row(self.store, "train", self.data.sequence_length, window)._asdict()


class _ValidationRows:
    """The first windows of one fixed shuffle of the validation split, whatever the seed of training."""

    def __init__(self, store: TokenStore, data: DataConfig, num_sequences: int):
        self.store, self.data, self.num_sequences = store, data, num_sequences
        self.num_windows = num_windows(store, "validation", data.sequence_length)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        window = permute(int(row), self.num_windows, permutation_key(0, 0, "validation"))
        return read_row(self.store, "validation", self.data.sequence_length, window)._asdict()


def _batched(rows: grain.MapDataset, data: DataConfig, batch: int) -> Iterator[dict[str, np.ndarray]]:
    # Threads, not processes: the store releases the GIL, and worker processes would change the order of rows.
    threads = min(data.read_threads, data.prefetch_sequences)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.prefetch_sequences if threads else 0)
    return iter(rows.to_iter_dataset(options).batch(batch, drop_remainder=False))


def train_batches(store: TokenStore, data: DataConfig, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of steps start_step, start_step + 1, ... without end: `Row` as a dict, each field [B, ...].

    The same steps have the same batches, wherever the iteration starts and however many threads read. CorruptStore
    when a damaged file is met. Call `check_store` before.
    """
    rows = grain.MapDataset.source(_TrainRows(store, data))
    return _batched(rows[start_step * data.batch_sequences :], data, data.batch_sequences)


def _too_few_validation(available: int, wanted: int, name: str) -> list[str]:
    if wanted <= available:
        return []
    rule = f"must be at most the {available} whole sequences of the validation split"
    return [f"{name} = {wanted}: {rule}; lower it or data.sequence_length, or prepare a larger validation_fraction"]


def validation_batches(store: TokenStore, data: DataConfig, num_sequences: int, batch: int):
    """The same `num_sequences` windows of the validation split at every call, as batches like those of training.

    The last batch is shorter if `batch` does not divide. UserError if the split has fewer windows.
    """
    available = num_windows(store, "validation", data.sequence_length)
    problems = _too_few_validation(available, num_sequences, "num_sequences")
    if problems:
        raise UserError(*problems)
    return _batched(grain.MapDataset.source(_ValidationRows(store, data, num_sequences)), data, batch)


def check_store(store: TokenStore, config: Config) -> None:
    """UserError with everything that makes `store` unfit for the run."""
    length, vocab_size = config.data.sequence_length, store.manifest["tokenizer"]["vocab_size"]
    problems = []
    if vocab_size > config.model.vocab_size:
        problems.append(
            f"model.vocab_size = {config.model.vocab_size}: must be at least {vocab_size}, the ids of the tokenizer of "
            f"data.path = {str(store.path)!r}"
        )
    if not num_windows(store, "train", length):
        tokens = store.num_tokens("train")
        most = f"at most {tokens - 1} fits" if tokens > 1 else "it has no sequence at all"
        problems.append(
            f"data.sequence_length = {length}: must be below the {tokens} tokens of the training split of data.path = "
            f"{str(store.path)!r}; {most}"
        )
    available = num_windows(store, "validation", length)
    problems += _too_few_validation(available, config.train.eval_sequences, "train.eval_sequences")
    if problems:
        raise UserError(*problems)


def data_position(store: TokenStore, config: Config, step: int) -> dict[str, int | str]:
    """What a checkpoint keeps so that its run goes on with the very next row, as JSON values."""
    return {
        "manifest": store.digest,
        "seed": config.data.seed,
        "sequence_length": config.data.sequence_length,
        "batch_sequences": config.data.batch_sequences,
        "next_row": step * config.data.batch_sequences,
    }


_RESTORE = {
    "manifest": "the tokens are not those that the run began with: set data.path to its store, or begin a new run",
    "seed": "set data.seed to the run's, or begin a new run",
    "sequence_length": "set data.sequence_length to the run's, or begin a new run",
    "batch_sequences": "set data.batch_sequences to the run's, or begin a new run",
    "next_row": "the checkpoint is of another step than its name says: restore another checkpoint",
}


def check_position(saved: dict, store: TokenStore, config: Config, step: int) -> None:
    """UserError with every difference between a checkpoint's `data_position` and the one that would continue it."""
    expected = data_position(store, config, step)
    names = [*expected, *(name for name in saved if name not in expected)]
    problems = [
        f"data position: {name} is {saved.get(name)!r} in the checkpoint and {expected.get(name)!r} now; "
        f"{_RESTORE.get(name, 'this k2jax does not know it: resume with the one that saved it')}"
        for name in names
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise UserError(*problems)
