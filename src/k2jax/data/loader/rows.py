"""Rows: what one sequence of a batch holds, read from the stores.

A row that cannot be read, or holds an id outside the vocabulary, stops the run or is replaced by another window of the
same source, chosen by its own number: so the same on every process and at every resume.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from k2jax.config import Config
from k2jax.data.loader.corpus import Corpus, make_cut
from k2jax.data.loader.fim import fill_in_middle
from k2jax.data.loader.timeline import Timeline
from k2jax.data.splitmix import mix
from k2jax.data.store.manifest import CorruptStore
from k2jax.data.store.reader import Stream
from k2jax.errors import UserError

_TRIES = 64  # windows to look at in place of a bad one
_STRIDE = 0.6180339887498949  # of the source: far from the damage, and in few steps everywhere


class Row(NamedTuple):
    """One sequence. Inputs are tokens[:-1], targets tokens[1:]."""

    tokens: np.ndarray  # int32 [T + 1]
    segment_ids: np.ndarray  # int32 [T]: document of each input, counted from 0 in the row
    positions: np.ndarray  # int32 [T]: tokens since the document began, or since the row did


def read_pieces(pieces: list[tuple[Stream, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens start..stop-1 of streams, one piece after the other, all asked for before the first is awaited.

    Gives the tokens, uint32, and the rising places in them where a piece or a document begins, int64.
    """
    begun = [stream.start(start, stop) for stream, start, stop in pieces]
    ends = np.cumsum([stop - start for _, start, stop in pieces])
    mine: dict[Stream, list] = {}
    for (stream, start, stop), end in zip(pieces, ends.tolist(), strict=True):
        mine.setdefault(stream, []).append((start, stop, end - (stop - start)))
    starts = np.sort(np.concatenate([stream.first_tokens(ranges) for stream, ranges in mine.items()]))
    return np.concatenate([wait() for wait in begun]), starts


def make_rows(tokens: np.ndarray, starts: np.ndarray, length: int, mask_documents: bool = True) -> Row:
    """The pieces that `read_pieces` gave for R rows of T = length, as one Row of arrays [R, ...]."""
    tokens = tokens.view(np.int32).reshape(-1, length + 1)  # ids are below 2^31, which `check_ids` has seen to
    shape = (len(tokens), length)
    if not mask_documents:
        return Row(tokens, np.zeros(shape, np.int32), np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1)))
    row, place = np.divmod(starts, length + 1)
    inside = place < length  # a last target may begin a document
    row, place = row[inside], place[inside]
    firsts = row * length + place
    lengths = np.diff(firsts, append=tokens.size - len(tokens))
    order = np.arange(len(row)) - np.searchsorted(row, row)
    positions = np.arange(tokens.size - len(tokens), dtype=np.int32) - np.repeat(firsts.astype(np.int32), lengths)
    return Row(tokens, np.repeat(order.astype(np.int32), lengths).reshape(shape), positions.reshape(shape))


def _join(read: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of (tokens, starts) as `read_pieces` would give them together."""
    firsts = np.cumsum([0, *(len(tokens) for tokens, _ in read)])
    starts = [starts + first for (_, starts), first in zip(read, firsts[:-1], strict=True)]
    return np.concatenate([tokens for tokens, _ in read]), np.concatenate(starts)


class BadRow(UserError):
    """A row's window is damaged or has ids that the model does not know."""


def check_ids(tokens: np.ndarray, vocab_size: int, where: Callable[[int], str]) -> None:
    """BadRow for the first id that a vocabulary of this size does not have; where(its place) says where it lies."""
    if tokens.max() >= vocab_size:
        place = int(np.argmax(tokens >= vocab_size))
        raise BadRow(f"{where(place)}: id {int(tokens[place])} is not below model.vocab_size = {vocab_size}")


class RowReader:
    """Rows of the training data by their numbers, and their windows."""

    def __init__(self, corpus: Corpus, timeline: Timeline, config: Config):
        self.corpus, self.timeline, self.config, self.data = corpus, timeline, config, config.data
        self.streams, self.cuts, self.edges = {}, {}, (-1, -1)
        stores = {store.digest: store for store in corpus.stores}
        for number, (name, digest) in enumerate(timeline.keys):
            if digest in stores:
                self.streams[number] = stores[digest].streams["train"][name]
                self.cuts[number] = make_cut(stores[digest], config, name)
        if self.data.fim_rate and (tokenizer := corpus.tokenizer()):
            self.edges = tokenizer.bos, tokenizer.eos

    def stream(self, source: int) -> Stream:
        """The tokens of a source of the timeline. UserError if its store is not open."""
        if source not in self.streams:
            name, store = self.timeline.keys[source]
            raise UserError(
                f"source {name!r} of the store with digest {store} is not in {self.corpus.path}; give its path"
            )
        return self.streams[source]

    def _pieces(self, source: int, window: int) -> list[tuple[Stream, int, int]]:
        stream = self.stream(source)
        return [(stream, start, stop) for start, stop in self.cuts[source].pieces(window)]

    def read_window(self, source: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """`read_pieces` of a window. BadRow names source, window, document and the file with the damage."""
        pieces = self._pieces(source, window)
        try:
            tokens, starts = read_pieces(pieces)
        except CorruptStore as error:
            raise BadRow(f"{self._describe(source, window, pieces[0][1])}: {error}") from None

        def where(place: int) -> str:
            token = self._token(pieces, place)
            return f"{self._describe(source, window, token)}: {pieces[0][0].chunk(token)}"

        check_ids(tokens, self.config.model.vocab_size, where)
        return tokens, starts

    @staticmethod
    def _token(pieces: list[tuple[Stream, int, int]], place: int) -> int:
        for _, start, stop in pieces:
            if place < stop - start:
                return start + place
            place -= stop - start
        raise AssertionError("a place outside the row")

    def _describe(self, source: int, window: int, token: int) -> str:
        stream = self.streams[source]
        try:
            document, _ = stream.documents(token, token + 1)
            named = f"document {document} {stream.records([document])[0]['name']!r}"
        except CorruptStore:  # the damage may be there
            named = "a document whose name cannot be read"
        return f"source {self.timeline.names[source]}, window {window}, token {token}, {named}"

    def _replace(self, source: int, window: int, why: str) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """(`read_window`, its number) of the window in place of one that is bad for the reason `why`.

        BadRow where many are bad.
        """
        size = int(self.timeline.windows[source])
        stride, bad = max(1, int(size * _STRIDE)), {window}
        for number in range(1, _TRIES):
            other = (window + number * stride) % size
            try:
                return self.read_window(source, other), other
            except BadRow:
                bad.add(other)
        rule = "a source whose one shard is damaged cannot be replaced within itself; repair the store"
        raise BadRow(f"{why}; all {len(bad)} windows that were looked at, of {size}, are bad: {rule}")

    def read_rows(self, rows: np.ndarray) -> tuple[Row, np.ndarray]:
        """(Row of arrays [rows, ...], int64 [rows] the windows that replaced theirs, or -1) of rows of the data."""
        found = self.timeline.locate(rows)
        windows = list(zip(found.source.tolist(), found.window.tolist(), strict=True))
        replaced = np.full(len(rows), -1, np.int64)
        try:
            tokens, starts = read_pieces([piece for window in windows for piece in self._pieces(*window)])
            bad = tokens.max() >= self.config.model.vocab_size
        except CorruptStore:
            bad = True
        if bad:  # each by itself: to name what is wrong, or to replace that row alone
            read = [self._read(row, *window) for row, window in zip(rows.tolist(), windows, strict=True)]
            tokens, starts = _join([values for values, _ in read])
            replaced[:] = [other for _, other in read]
        if self.data.fim_rate:
            tokens, starts = self._fill_in_middle(rows.tolist(), tokens, starts)
        return make_rows(tokens, starts, len(tokens) // len(rows) - 1, self.data.mask_documents), replaced

    def _read(self, row: int, source: int, window: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """(`read_window`, the window that replaced the row's own, or -1)."""
        try:
            return self.read_window(source, window), -1
        except BadRow as error:
            if not self.data.max_bad_rows:
                rule = "repair the store, or let data.max_bad_rows rows be replaced"
                raise BadRow(f"row {row}: {error}; {rule}") from None
            return self._replace(source, window, str(error))

    def _fill_in_middle(self, rows: list[int], tokens: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width, changed = len(tokens) // len(rows), []
        for number, row in enumerate(rows):
            low, high = np.searchsorted(starts, [number * width, (number + 1) * width])
            here = tokens[number * width : (number + 1) * width], starts[low:high] - number * width
            key = mix((self.data.seed * 0x9E3779B97F4A7C15 + row) % 2**64)
            changed.append(fill_in_middle(*here, self.edges, self.data.fim_rate, self.data.fim_tokens, key))
        return _join(changed)
