"""The source and window of every row of a run, by arithmetic alone.

The rows of the data, r = step * B + place in the batch, fall into blocks: a block begins with a phase of the run, or
where its mixture was changed. In a block with integer weights w, the sources take turns in a pattern of sum(w) rows
that repeats and that spreads each source evenly. The n-th row that a source ever has is window permute(n mod N) of its
N under a key of its own for every pass. So rows, windows and counts come out of each other without any state.

The segments that a run keeps in timeline.json are a list, JSON values,
{"from_step", "path", "digest", "sources": {name: {"windows", "epochs", ...}},
"phases": [[start_tokens, {name: weight}]], "validation_fractions": {name: that of its store, or None}}
where `path` and `digest` say which stores were read.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from k2jax.config import Config
from k2jax.config_rules import read_steps
from k2jax.data.loader.shuffle import permute, unpermute


def permutation_key(seed: int, epoch: int, stream: str = "train") -> int:
    """64-bit key of the shuffle of one pass over a stream, such as "train/web"."""
    name = f"k2jax permutation 1: seed {seed}, epoch {epoch}, {stream}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Skips:
    """The data step that a training step reads: all in turn, except those in `ranges` [first, stop)."""

    def __init__(self, texts: tuple[str, ...] | None):
        self.ranges = [read_steps(text) for text in texts or ()]

    def data_step(self, step: int) -> int:
        """The data's step that training step `step` reads."""
        for first, stop in self.ranges:
            if step < first:
                break
            step += stop - first
        return step

    def next_data_step(self, steps: int) -> int:
        """The first step of the data that `steps` steps of training have not come to."""
        return self.data_step(steps - 1) + 1 if steps else 0

    def step_of(self, data_step: int) -> int | None:
        """The training step that reads it; None: it is skipped."""
        if any(first <= data_step < stop for first, stop in self.ranges):
            return None
        return data_step - sum(stop - first for first, stop in self.ranges if stop <= data_step)

    def before(self, data_step: int) -> list[list[int]]:
        """The ranges, as far as they lie before `data_step`."""
        return [[first, min(stop, data_step)] for first, stop in self.ranges if first < data_step]


class RowOrigin(NamedTuple):
    """The origin of rows, int64 arrays of one shape. source: number in Timeline.names."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


class _Block:
    """Rows from `start` on, until the next block, with one pattern of sources."""

    def __init__(self, start: int, weights: np.ndarray, before: np.ndarray):
        self.start, self.weights, self.before = start, weights, before  # before: rows that each source had by `start`
        # Source s has its k-th row of the pattern at (2k + 1) / 2w of it; of those that meet, the first source leads.
        # Weights 3 and 1: a at 1/6, 3/6, 5/6 and b at 1/2, so a a b a. Any stretch of the pattern is then within a row
        # or so of its weights, and `source`, `rank` and `slots` (3 and 1: 0 0 1 0, 0 1 0 2, [0 1 3] and [2]) turn row
        # numbers into counts and back by a division and a lookup, however many turns the block has run.
        source = np.repeat(np.arange(len(weights)), weights)
        rank = np.concatenate([np.arange(w) for w in weights])
        order = np.argsort((2 * rank + 1) / (2 * weights[source]), kind="stable")
        self.source, self.rank = source[order].astype(np.uint16), rank[order].astype(np.int32)
        self.slots = [np.flatnonzero(self.source == s) for s in range(len(weights))]

    def counts(self, row: int) -> np.ndarray:
        """Rows that each source has had before row `row` of the data."""
        turns, rest = divmod(row - self.start, len(self.source))
        partial = np.bincount(self.source[:rest], minlength=len(self.weights))
        return self.before + turns * self.weights + partial

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many rows it has had before) of each row."""
        turns, slots = np.divmod(rows - self.start, len(self.source))
        source = self.source[slots].astype(np.int64)
        return source, self.before[source] + turns * self.weights[source] + self.rank[slots]

    def row_of(self, source: int, number: int) -> int | None:
        """The row, were the block endless, that is the source's `number`-th ever; None: it came before."""
        if not self.weights[source] or number < self.before[source]:
            return None
        turns, rank = divmod(number - int(self.before[source]), int(self.weights[source]))
        return self.start + turns * len(self.source) + int(self.slots[source][rank])


class Timeline:
    """Segments as arithmetic. names: of all sources that any segment has; windows: how many each has."""

    def __init__(self, segments: list[dict], seed: int, batch: int, batch_tokens: int, skips: Skips):
        self.segments, self.seed, self.batch, self.skips = segments, seed, batch, skips
        # A source of another store is another source, though it may have the same name.
        keys = {(name, entry["store"]): entry for part in segments for name, entry in part["sources"].items()}
        self.keys = list(keys)
        self.names = [name for name, _ in self.keys]
        self.windows = np.array([entry["windows"] for entry in keys.values()], np.int64)
        self.blocks = []
        for number, part in enumerate(segments):
            end = segments[number + 1]["from_step"] if number + 1 < len(segments) else None
            self._add_segment(part, end, batch_tokens)
        self._starts = np.array([block.start for block in self.blocks], np.int64)

    def _add_segment(self, part: dict, end: int | None, batch_tokens: int) -> None:
        firsts = [-(-tokens // batch_tokens) for tokens, _ in part["phases"]]
        for first, after, (_, shares) in zip(firsts, [*firsts[1:], None], part["phases"], strict=True):
            step = max(first, part["from_step"])
            if (after is not None and after <= step) or (end is not None and end <= step):
                continue  # another has taken over before its first step
            start = self.rows_before(step)
            weights = np.array([self._weight(part, shares, key) for key in self.keys], np.int64)
            before = self.blocks[-1].counts(start) if self.blocks else np.zeros(len(self.keys), np.int64)
            if self.blocks and self.blocks[-1].start == start:
                self.blocks.pop()
            self.blocks.append(_Block(start, weights, before))

    @staticmethod
    def _weight(part: dict, shares: dict[str, int], key: tuple[str, str]) -> int:
        name, store = key
        return shares.get(name, 0) if part["sources"].get(name, {}).get("store") == store else 0

    def counts(self, row: int) -> np.ndarray:
        """int64 [sources]: rows that each has had before row `row` of the data."""
        return self.blocks[int(np.searchsorted(self._starts, row, "right")) - 1].counts(row)

    def planned(self, row: int) -> np.ndarray:
        """float64 [sources]: rows before `row` that the weights ask for, were rows divisible."""
        total = np.zeros(len(self.keys))
        for block, end in zip(self.blocks, [*self._starts[1:].tolist(), row], strict=True):
            total += max(0, min(end, row) - block.start) * (block.weights / block.weights.sum())
        return total

    def locate(self, rows: np.ndarray) -> RowOrigin:
        """The origin of rows of the data. rows: int64 of any shape."""
        rows = np.asarray(rows, np.int64)
        which = np.searchsorted(self._starts, rows, "right") - 1
        place = RowOrigin(np.empty_like(rows), np.empty_like(rows), np.empty_like(rows))
        for number in np.unique(which):
            here = which == number
            source, order = self.blocks[number].locate(rows[here])
            place.source[here], place.window[here] = source, order
        place.epoch[...], index = np.divmod(place.window, self.windows[place.source])
        for source in np.unique(place.source).tolist():
            mine = place.source == source
            for epoch in np.unique(place.epoch[mine]).tolist():  # a shuffle for each pass, of which a batch has few
                here = mine & (place.epoch == epoch)
                key = permutation_key(self.seed, epoch, f"train/{self.names[source]}")
                place.window[here] = permute(index[here], int(self.windows[source]), key)
        return place

    def rows_of(self, source: int, window: int, stop: int) -> list[int]:
        """Every row of the data before `stop` that is this window."""
        size, found = int(self.windows[source]), []
        for epoch in range(-(-int(self.counts(stop)[source]) // size)):
            key = permutation_key(self.seed, epoch, f"train/{self.names[source]}")
            number = epoch * size + unpermute(window, size, key)
            for block, end in zip(self.blocks, [*self._starts[1:].tolist(), stop], strict=True):
                row = block.row_of(source, number)
                if row is not None and row < min(end, stop):
                    found.append(row)
                    break
        return found

    def rows_before(self, steps: int) -> int:
        """The first row of the data that `steps` steps of training have not come to."""
        return self.skips.next_data_step(steps) * self.batch

    def step_rows(self, step: int) -> np.ndarray:
        """int64 [B]: the rows of the data that training step `step` reads."""
        return self.skips.data_step(step) * self.batch + np.arange(self.batch)

    def segment(self, step: int) -> dict:
        """The segment that holds at training step `step`."""
        return [part for part in self.segments if part["from_step"] <= step][-1]

    def digest(self, steps: int) -> str:
        """Of what the first `steps` steps have followed."""
        past = [part for part in self.segments if part["from_step"] < steps or part is self.segments[0]]
        past = [{key: value for key, value in part.items() if key != "path"} for part in past]  # stores may move
        return hashlib.sha256(json.dumps(past, sort_keys=True).encode()).hexdigest()


def make_timeline(segments: list[dict], config: Config) -> Timeline:
    """The run's timeline."""
    skips = Skips(config.data.skip_steps)
    return Timeline(segments, config.data.seed, config.data.batch_sequences, config.batch_tokens, skips)
