"""Rows of a stream: slices of its tokens, or whole documents packed best-fit (arXiv 2404.10830) without padding.

A row has T + 1 tokens, of which inputs and targets are made. Slices are shared at their ends: window w is the tokens
[w*T, w*T + T]. Packed rows share nothing: documents longer than a row are cut into rows, and what is left of them goes,
longest first, into the row that it fills best. Rooms that remain are filled with pieces of the emptiest rows, so a row
is always full, every token is in one row at most, and fewer than T + 1 at the end of each part are in none.
"""

import hashlib
import io
from pathlib import Path

import numpy as np

from k2jax.data.store.reader import Stream
from k2jax.errors import UserError
from k2jax.files import write_atomic

PACKING = 1  # version of the order that `pack` gives


class Windows:
    """Slices of a stream. The fewer than T tokens after the last are never read."""

    digest = None

    def __init__(self, stream: Stream, length: int):
        self.length, self.num_windows = length, max(0, stream.num_tokens - 1) // length

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """[start, stop) of each piece of a row, tokens of the stream."""
        return [(window * self.length, window * self.length + self.length + 1)]

    def windows_with(self, start: int, stop: int) -> list[int]:
        """Windows that have some of the tokens [start, stop), rising; a shared one is in two."""
        first = max(0, -(-start // self.length) - 1)
        return list(range(first, min(-(-stop // self.length), self.num_windows)))


def _best_fit(lengths: np.ndarray, room: int) -> tuple[list[list[int]], list[int]]:
    """(pieces in each bin, room that each has left): longest first, into the fullest bin that has the room."""
    # rooms: bit r is set if some bin has r tokens of room; by_room[r] are those bins. The best fit for 5 tokens is the
    # lowest bit from 5 on: of rooms = 0b1010000100 (2, 7 and 9 free) shifted by 5, 0b10100, bit 2, so 5 + 2 = 7.
    # So a piece costs one operation on an integer of as many bits as a row has tokens, not a search through all bins.
    bins, left, by_room, rooms = [], [], {}, 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            found = length + (fitting & -fitting).bit_length() - 1
            number = by_room[found].pop()
            if not by_room[found]:
                rooms ^= 1 << found
        else:
            number, found = len(bins), room
            bins.append([])
            left.append(room)
        bins[number].append(piece)
        left[number] = rest = found - length
        if rest:
            rooms |= 1 << rest
            by_room.setdefault(rest, []).append(number)
    return bins, left


def pack(borders: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `size` tokens out of documents with these borders.

    Gives int64 [pieces, 2], the first token and the length of each, and int64 [rows + 1], the first piece of each row.
    """
    starts, lengths = borders[:-1].astype(np.int64), np.diff(borders.astype(np.int64))
    # Documents of a row's length or more give whole rows first: of 10 tokens at 50 with size 4 the rows 50 and 54, and
    # the rest of 2 at 58. arange - repeat(cumsum) counts 0, 1, ... anew in each document, without a loop over them.
    whole = lengths // size
    first = np.repeat(starts, whole) + size * (np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole))
    rests, places = lengths - whole * size, starts + whole * size
    places, rests = places[rests > 0], rests[rests > 0]
    bins, left = _best_fit(rests, size)
    order = sorted(range(len(bins)), key=lambda number: (left[number], number))
    rows = [[(int(places[p]), int(rests[p])) for p in bins[number]] for number in order]
    # Every row is to be full, so as many rows are kept as the tokens fill, the fullest; the pieces of the others are
    # the stock that tops up the kept ones, cut where need be. What is left of it, less than a row, is read by nobody.
    kept = int(rests.sum()) // size
    stock = [piece for row in rows[kept:] for piece in row][::-1]
    for row, number in zip(rows[:kept], order, strict=False):
        room = left[number]
        while room:
            place, length = stock.pop()
            row.append((place, min(length, room)))
            if length > room:
                stock.append((place + room, length - room))
            room -= row[-1][1]
    packed = [piece for row in rows[:kept] for piece in row]
    counts = [1] * len(first) + [len(row) for row in rows[:kept]]
    pieces = np.concatenate(
        [np.stack([first, np.full_like(first, size)], 1), np.array(packed, np.int64).reshape(-1, 2)]
    )
    return pieces, np.cumsum([0, *counts], dtype=np.int64)


def _load_or_make(path: Path, make) -> tuple[np.ndarray, np.ndarray, str]:
    """(pieces, rows, their digest), from `path` where it is whole, else made and written there."""
    try:
        digest, content = path.read_bytes()[:64], path.read_bytes()[64:]
    except OSError:
        digest = content = b""
    if not content or hashlib.sha256(content).hexdigest().encode() != digest:
        file = io.BytesIO()
        for values in make():
            np.save(file, values)
        content = file.getvalue()
        digest = hashlib.sha256(content).hexdigest().encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, digest + content)
        except OSError as error:
            raise UserError(f"data.index_dir: {path} cannot be written: {error.strerror}; name another") from None
    file = io.BytesIO(content)
    return np.load(file), np.load(file), digest.decode()


class Packing:
    """Packed rows of a stream. The index is made once for a store and kept in `index_dir` under the store's digest."""

    def __init__(self, stream: Stream, length: int, store: str, index_dir: str):
        found, first, all_digests = [], 0, []
        for number, part in enumerate(stream.parts):
            key = f"packing {PACKING}: {store} {stream.name} {number} {length}"
            path = Path(index_dir) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.packing"
            pieces, rows, digest = _load_or_make(path, lambda p=part: pack(p.load_borders(), length + 1))
            found.append((pieces + [first, 0], rows))
            first += part.num_tokens
            all_digests.append(digest)
        self._parts, self.digest = found, hashlib.sha256(" ".join(all_digests).encode()).hexdigest()
        self._first_row = np.cumsum([0, *(len(rows) - 1 for _, rows in found)])
        self.num_windows = int(self._first_row[-1])

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """[start, stop) of each piece of a row, tokens of the stream."""
        number = int(np.searchsorted(self._first_row, window, "right")) - 1
        pieces, rows = self._parts[number]
        row = window - int(self._first_row[number])
        return [(start, start + length) for start, length in pieces[rows[row] : rows[row + 1]].tolist()]

    def windows_with(self, start: int, stop: int) -> list[int]:
        """Rows that have some of the tokens [start, stop), rising."""
        found = []
        for first, (pieces, rows) in zip(self._first_row, self._parts, strict=False):
            hits = np.flatnonzero((pieces[:, 0] < stop) & (pieces.sum(1) > start))
            found += (first + np.searchsorted(rows, hits, "right") - 1).tolist()
        return sorted({*found})
