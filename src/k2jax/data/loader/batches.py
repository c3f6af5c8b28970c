"""Batches as a pure function of (stores, timeline, step): no iterator state, so resume and auditing are arithmetic.

Dims: B sequences of a batch, T data.sequence_length. What a row holds is in rows.py, its origin in timeline.py.
"""

from collections.abc import Iterator

import grain
import numpy as np

from k2jax.config import Config, DataConfig
from k2jax.data.loader.corpus import Corpus
from k2jax.data.loader.packing import Windows
from k2jax.data.loader.rows import RowReader, check_ids, make_rows, read_pieces
from k2jax.data.loader.shuffle import permute
from k2jax.data.loader.timeline import Timeline, permutation_key
from k2jax.errors import UserError
from k2jax.words import counted

NUM_ROWS = 2**62  # more than any run reads; Grain wants a length
_ROWS_PER_READ = 64  # most rows that one thread reads at a time: they share arithmetic and waiting


def too_few_validation(available: int, wanted: int, name: str) -> list[str]:
    """The message for a validation split with fewer sequences than are wanted."""
    if wanted <= available:
        return []
    rule = f"must be at most the {counted(available, 'whole sequence')} of the validation split"
    fix = "lower data.sequence_length, or prepare with a larger --validation-fraction"
    return [f"{name} = {wanted}: {rule}; " + (f"nearest: {available}; or " if available else "") + fix]


def num_windows(corpus: Corpus, split: str, sequence_length: int, source: str | None = None) -> int:
    """Whole windows in a split, or in one source of it. A source's trailing partial window is dropped."""
    names = corpus.streams[split] if source is None else [source]
    return sum(Windows(corpus.streams[split][name], sequence_length).num_windows for name in names)


class _TrainRows:
    """Groups of rows that training can ever ask for: those at `places` of every batch, in turn."""

    def __init__(self, reader: RowReader, places: np.ndarray, group: int):
        self.reader, self.timeline, self.places = reader, reader.timeline, places.reshape(-1, group)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, part = divmod(int(index), len(self.places))
        rows = self.timeline.skips.data_step(step) * self.timeline.batch + self.places[part]
        read, replaced = self.reader.read_rows(rows)
        return read._asdict() | ({"replaced": replaced} if self.reader.data.max_bad_rows else {})


class _ValidationRows:
    """The first windows of one fixed shuffle of the validation split, whatever the seed of training.

    Those at `places` of each batch; `places` None: all.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        num_sequences: int,
        source: str | None,
        batch: int,
        places: np.ndarray | None,
    ):
        if places is None:
            self.numbers = np.arange(num_sequences)
        else:
            numbers = (np.arange(0, num_sequences, batch)[:, None] + places).ravel()
            self.numbers = numbers[numbers < num_sequences]
        self.names = sorted(corpus.streams["validation"]) if source is None else [source]
        self.streams = [corpus.streams["validation"][name] for name in self.names]
        self.cuts = [Windows(stream, config.data.sequence_length) for stream in self.streams]
        self.firsts = np.cumsum([0, *(cut.num_windows for cut in self.cuts)])
        self.config = config

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        window = permute(int(self.numbers[index]), int(self.firsts[-1]), permutation_key(0, 0, "validation"))
        number = int(np.searchsorted(self.firsts, window, "right")) - 1
        stream = self.streams[number]
        ((start, stop),) = self.cuts[number].pieces(window - int(self.firsts[number]))
        tokens, starts = read_pieces([(stream, start, stop)])

        def where(place: int) -> str:
            return f"held-out text, source {self.names[number]}: {stream.chunk(start + place)}"

        check_ids(tokens, self.config.model.vocab_size, where)
        rows = make_rows(tokens, starts, len(tokens) - 1, self.config.data.mask_documents)
        return {name: values[0] for name, values in rows._asdict().items()}


def _options(data: DataConfig, sequences: int) -> grain.ReadOptions:
    # Threads, not processes: the store releases the GIL, and worker processes would change the order of rows.
    buffer = -(-data.prefetch_sequences // sequences)
    threads = min(data.read_threads, buffer)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer if threads else 0)


def train_batches(
    corpus: Corpus, timeline: Timeline, config: Config, start_step: int, places: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of steps start_step, start_step + 1, ... without end: `Row` as a dict, each field [B, ...].

    places: the rows of a batch that this process needs, by their numbers in it; None: all. The same steps have the same
    rows, wherever the iteration starts, however many threads and processes read. With data.max_bad_rows there is also
    "replaced" int64 [B], the window that was read in place of a bad one, else -1. BadRow when a damaged file or an
    unknown id is met. Call `settle_timeline` before.
    """
    places = np.arange(config.data.batch_sequences) if places is None else np.asarray(places)
    most = min(_ROWS_PER_READ, max(1, config.data.prefetch_sequences // max(1, config.data.read_threads)))
    group = max(n for n in range(1, most + 1) if len(places) % n == 0)
    groups = len(places) // group
    rows = grain.MapDataset.source(_TrainRows(RowReader(corpus, timeline, config), places, group))
    rows = rows[start_step * groups :].to_iter_dataset(_options(config.data, group))
    if groups == 1:  # nothing to join, so nothing is copied
        yield from rows
    for batch in rows.batch(groups, drop_remainder=False):
        yield {name: values.reshape(-1, *values.shape[2:]) for name, values in batch.items()}


def validation_batches(
    corpus: Corpus,
    config: Config,
    num_sequences: int,
    batch: int,
    source: str | None = None,
    places: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The same `num_sequences` windows of the validation split at every call, as batches like those of training.

    source: only of that one. places: as of `train_batches`. The last batch is shorter if `batch` does not divide, and is
    not there if none of its rows is at `places`. UserError if there are fewer windows, BadRow when an id is met that the model does not know.
    """
    available = num_windows(corpus, "validation", config.data.sequence_length, source)
    problems = too_few_validation(available, num_sequences, "num_sequences")
    if problems:
        raise UserError(*problems)
    rows = grain.MapDataset.source(_ValidationRows(corpus, config, num_sequences, source, batch, places))
    size = batch if places is None else len(places)
    return iter(rows.to_iter_dataset(_options(config.data, 1)).batch(size, drop_remainder=False))


def data_position(timeline: Timeline, config: Config, step: int) -> dict[str, object]:
    """The data position that a checkpoint keeps, as JSON values: its run goes on with the very next row."""
    next_step = timeline.skips.next_data_step(step)
    return {
        "manifest": timeline.segment(max(step - 1, 0))["digest"],
        "timeline": timeline.digest(step),
        "seed": config.data.seed,
        "sequence_length": config.data.sequence_length,
        "batch_sequences": config.data.batch_sequences,
        "next_row": timeline.rows_before(step),
        "skipped": timeline.skips.before(next_step),
    }


_RESTORE = {
    "manifest": "the tokens are not those that the run began with: set data.path to its store, or begin a new run",
    "timeline": "the mixture of steps already done is another: restore the run's timeline.json, or begin a new run",
    "seed": "set data.seed to the run's, or begin a new run",
    "sequence_length": "set data.sequence_length to the run's, or begin a new run",
    "batch_sequences": "set data.batch_sequences to the run's, or begin a new run",
    "next_row": "the checkpoint is of another step than its name says: restore another checkpoint",
    "skipped": "data.skip_steps may change only from next_row on: give the same steps before it",
}


def check_position(saved: dict, timeline: Timeline, config: Config, step: int) -> None:
    """UserError with every difference between a checkpoint's `data_position` and the one that would continue it."""
    expected = data_position(timeline, config, step)
    names = [*expected, *(name for name in saved if name not in expected)]
    problems = [
        f"data position: {name} is {saved.get(name)!r} in the checkpoint and {expected.get(name)!r} now; "
        f"{_RESTORE.get(name, 'this k2jax does not know it: resume with the one that saved it')}"
        for name in names
        if saved.get(name) != expected.get(name)
    ]
    if problems:
        raise UserError(*problems)
