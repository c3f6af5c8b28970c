"""Rows: what one sequence of a batch holds, read from the stores.

A row that cannot be read, or holds an id outside the vocabulary, stops the run or is replaced by another window of the
same source, chosen by its own number: so the same on every process and at every resume.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from k2jax.config import Config, UserError
from k2jax.data.corpus import Corpus, make_cut
from k2jax.data.fim import fill_in_middle
from k2jax.data.mixture import Timeline
from k2jax.data.permutation import mix
from k2jax.data.tokens import CorruptStore, Stream

_TRIES = 64  # windows to look at in place of a bad one
_STRIDE = 0.6180339887498949  # of the source: far from the damage, and in few steps everywhere


class Row(NamedTuple):
    """One sequence. Inputs are tokens[:-1], targets tokens[1:]."""

    tokens: np.ndarray  # int32 [T + 1]
    segment_ids: np.ndarray  # int32 [T]: document of each input, counted from 0 in the row
    positions: np.ndarray  # int32 [T]: tokens since the document began, or since the row did


def start_pieces(stream: Stream, pieces: list[tuple[int, int]]) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """`read_pieces` in two halves."""
    begun = [stream.start(start, stop) for start, stop in pieces]

    def finish() -> tuple[np.ndarray, np.ndarray]:
        tokens, starts, length = [], [], 0
        for (start, stop), wait in zip(pieces, begun, strict=True):
            tokens.append(wait())
            _, firsts = stream.documents(start, stop)
            starts.append(np.maximum(firsts - start, 0) + length)
            length += stop - start
        if len(tokens) == 1:
            return tokens[0], starts[0]
        return np.concatenate(tokens), np.concatenate(starts)

    return finish


def read_pieces(stream: Stream, pieces: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 tokens, int64 first tokens of the documents among them) of ranges of a stream, one after the other."""
    return start_pieces(stream, pieces)()


def make_rows(read: list[tuple[np.ndarray, np.ndarray]], mask_documents: bool = True) -> Row:
    """Rows of (tokens, first tokens of their documents) as one Row of arrays [rows, ...]."""
    length = len(read[0][0]) - 1
    tokens = np.empty((len(read), length + 1), np.int32)
    for number, (ids, _) in enumerate(read):
        tokens[number] = ids
    shape = (len(read), length)
    if not mask_documents:
        return Row(tokens, np.zeros(shape, np.int32), np.tile(np.arange(length, dtype=np.int32), (len(read), 1)))
    inside = [starts[: np.searchsorted(starts, length)] for _, starts in read]  # a last target may begin a document
    firsts = np.concatenate([starts + number * length for number, starts in enumerate(inside)]).astype(np.int32)
    lengths = np.diff(firsts, append=len(read) * length)
    order = np.concatenate([np.arange(len(starts), dtype=np.int32) for starts in inside])
    positions = np.arange(len(read) * length, dtype=np.int32) - np.repeat(firsts, lengths)
    return Row(tokens, np.repeat(order, lengths).reshape(shape), positions.reshape(shape))


def make_row(tokens: np.ndarray, starts: np.ndarray, mask_documents: bool = True) -> Row:
    """One of `make_rows`."""
    return Row(*(values[0] for values in make_rows([(tokens, starts)], mask_documents)))


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
        """The tokens of a source of the timeline. UserError where its store is not open."""
        if source not in self.streams:
            name, store = self.timeline.keys[source]
            raise UserError(f"source {name!r} of the store with digest {store} is not in {self.corpus.path}; give its path")
        return self.streams[source]

    def start_window(self, source: int, window: int) -> Callable | None:
        """Begin to read a window. None where that fails already; `read_window` will say why."""
        try:
            return start_pieces(self.stream(source), self.cuts[source].pieces(window))
        except CorruptStore:
            return None

    def read_window(
        self, source: int, window: int, begun: Callable | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, first tokens of documents). BadRow names source, window, document and the file with the damage.

        begun: what `start_window` gave for it.
        """
        stream = self.stream(source)
        pieces = self.cuts[source].pieces(window)
        try:
            tokens, starts = begun() if begun else read_pieces(stream, pieces)
        except CorruptStore as error:
            raise BadRow(f"{self._describe(source, window, pieces[0][0])}: {error}") from None

        def where(place: int) -> str:
            token = self._token(pieces, place)
            return f"{self._describe(source, window, token)}: {stream.chunk(token)}"

        check_ids(tokens, self.config.model.vocab_size, where)
        return tokens, starts

    @staticmethod
    def _token(pieces: list[tuple[int, int]], place: int) -> int:
        for start, stop in pieces:
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

    def replacement(self, source: int, window: int) -> int:
        """The window that is read in place of a bad one. BadRow where many are bad."""
        size = int(self.timeline.windows[source])
        stride = max(1, int(size * _STRIDE))
        for number in range(1, _TRIES):
            other = (window + number * stride) % size
            try:
                self.read_window(source, other)
                return other
            except BadRow:
                continue
        raise BadRow(f"{self._describe(source, window, 0)}: {_TRIES} windows in its place are bad too")

    def read_rows(self, rows: np.ndarray) -> tuple[Row, np.ndarray]:
        """(Row of arrays [rows, ...], int64 [rows] the windows that replaced theirs, or -1) of rows of the data."""
        found = self.timeline.locate(rows)
        places = list(zip(rows.tolist(), found.source.tolist(), found.window.tolist(), strict=True))
        begun = [self.start_window(source, window) for _, source, window in places]
        read = [self._read(*place, wait) for place, wait in zip(places, begun, strict=True)]
        rows = make_rows([values for values, _ in read], self.data.mask_documents)
        return rows, np.array([replaced for _, replaced in read], np.int64)

    def _read(self, row: int, source: int, window: int, begun: Callable | None) -> tuple[tuple, int]:
        """((tokens, first tokens of documents), the window that replaced the row's own, or -1)."""
        replaced = -1
        try:
            tokens, starts = self.read_window(source, window, begun)
        except BadRow as error:
            if not self.data.max_bad_rows:
                rule = "mend the store, or let data.max_bad_rows rows be replaced"
                raise BadRow(f"row {row}: {error}; {rule}") from None
            replaced = self.replacement(source, window)
            tokens, starts = self.read_window(source, replaced)
        if self.data.fim_rate:
            key = mix((self.data.seed * 0x9E3779B97F4A7C15 + row) % 2**64)
            fim = self.data.fim_rate, self.data.fim_tokens, key
            tokens, starts = fill_in_middle(tokens, starts, self.edges, *fim)
        return (tokens, starts), replaced
