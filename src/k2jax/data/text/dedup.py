"""Exact and near duplicates among any number of documents, in ranks that each hold a part of them.

A document is known by its number in the order of preparation; the first of equal ones stays. Exact: equal sha256.
Near: MinHash (Broder, 1997) over sets of 5 words. 25 bands of 5 hashes make candidates, and two of them count as
near duplicates where the share of all 125 hashes that agree, which estimates the Jaccard similarity of the sets with a
deviation of at most 0.045, reaches the threshold.

C columns of keys: the digest's, then one per band. D documents of one rank, H hashes, P pairs, W words.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from k2jax.data.splitmix import mix

_WORDS_IN_SHINGLE, _NUM_BANDS, _BAND_HASHES = 5, 25, 5
NUM_HASHES = _NUM_BANDS * _BAND_HASHES
LEAST_THRESHOLD = 0.7  # where a pair is still a candidate with 99 %: 1 - (1 - 0.7^5)^25
_SEED = 20250711
_NO_KEY = np.uint64(0)
_MOST_KINDS = 16  # different documents of one key that others are compared with; the other bands see the rest
# Scripts without spaces between words: a character of theirs counts as a word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


_ODD = mix(np.arange(1, _WORDS_IN_SHINGLE + 1, dtype=np.uint64)) | np.uint64(1)


def _shingles(text: str) -> np.ndarray:
    """uint64: a hash for each 5 words in a row, or for all where there are fewer; lower case, no punctuation."""
    words = WORD.findall(text.lower())
    if not words:
        return np.empty(0, np.uint64)
    hashes_W = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    size = min(_WORDS_IN_SHINGLE, len(words))
    windows = np.lib.stride_tricks.sliding_window_view(mix(hashes_W), size)
    return mix((windows * _ODD[:size]).sum(axis=1, dtype=np.uint64))


def share_of_common_shingles(a: str, b: str) -> float:
    """Jaccard similarity of the two texts' sets of 5 words; 0 where neither has words."""
    first, second = np.unique(_shingles(a)), np.unique(_shingles(b))
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / max(1, len(first) + len(second) - common)


def signature(text: str) -> np.ndarray:
    """uint32 [125] MinHash values, all 0 for a text without words."""
    import rensa

    shingles = _shingles(text)
    if not len(shingles):
        return np.zeros(NUM_HASHES, np.uint32)
    rows = np.array([0, len(shingles)], np.uint64)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, rows, NUM_HASHES, _SEED)
    return np.array(digests.to_rows()[0], np.uint32)


def _keys(digests: np.ndarray, signatures_DH: np.ndarray | None) -> np.ndarray:
    """uint64 [C, D]; _NO_KEY where a document has no words to compare."""
    columns = [np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0] | np.uint64(1)]
    if signatures_DH is not None:
        wordless = ~signatures_DH.any(axis=1)
        for band in range(_NUM_BANDS):
            key_D = np.full(len(digests), band + 1, np.uint64)
            for hash_D in signatures_DH[:, band * _BAND_HASHES : (band + 1) * _BAND_HASHES].T:
                key_D = mix(key_D * np.uint64(0x9E3779B97F4A7C15) + hash_D)
            columns.append(np.where(wordless, _NO_KEY, key_D | np.uint64(1)))
    return np.stack(columns)


def write_index(folder: Path, digests: np.ndarray, signatures_DH: np.ndarray | None) -> None:
    """Write what the search needs of the documents of one rank: digests uint8 [D, 32], signatures uint32 [D, H]."""
    keys_CD = _keys(digests, signatures_DH)
    order_CD = np.argsort(keys_CD, axis=1, kind="stable")
    np.save(folder / "digests.npy", digests)
    np.save(folder / "keys.npy", np.take_along_axis(keys_CD, order_CD, axis=1))
    np.save(folder / "rows.npy", order_CD.astype(np.uint32))
    if signatures_DH is not None:
        np.save(folder / "signatures.npy", signatures_DH)


class _Index:
    """The indexes of all ranks, mapped into memory; documents are counted through them in order."""

    def __init__(self, folders: list[Path]):
        self.keys, self.rows, self.digests, self.signatures = (
            [np.load(folder / f"{name}.npy", mmap_mode="r") if (folder / f"{name}.npy").exists() else None
             for folder in folders] for name in ("keys", "rows", "digests", "signatures")
        )  # fmt: skip
        self.starts = np.cumsum([0, *(len(digests) for digests in self.digests)])

    def candidates(self, column: int, low: int, high: int) -> Iterator[np.ndarray]:
        """Ascending numbers of the documents that share a key in [low, high) of a column."""
        found = []
        for keys_CD, rows_CD, start in zip(self.keys, self.rows, self.starts[:-1], strict=True):
            a = np.searchsorted(keys_CD[column], np.uint64(max(low, 1)), "left")
            b = np.searchsorted(keys_CD[column], np.uint64(high - 1), "right")
            found.append((keys_CD[column, a:b], rows_CD[column, a:b].astype(np.int64) + start))
        keys, numbers = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((numbers, keys))
        keys, numbers = keys[order], numbers[order]
        borders = np.flatnonzero(np.diff(keys)) + 1
        groups = zip([0, *borders.tolist()], [*borders.tolist(), len(keys)], strict=True)
        yield from (numbers[a:b] for a, b in groups if b - a > 1)

    def values(self, arrays: list, numbers: np.ndarray) -> np.ndarray:
        """The rows of `arrays`, one per rank, that belong to these documents."""
        ranks = np.searchsorted(self.starts, numbers, "right") - 1
        return np.stack([arrays[t][n - self.starts[t]] for t, n in zip(ranks, numbers, strict=True)])


def _pairs(numbers: np.ndarray, values: np.ndarray, least: float) -> Iterator[np.ndarray]:
    """(first, later) for the documents of one key whose values agree in a share of at least `least`."""
    for _ in range(_MOST_KINDS):
        if len(numbers) < 2:
            return
        agree = (values[1:] == values[0]).mean(axis=1) >= least
        yield np.stack([np.full(agree.sum(), numbers[0]), numbers[1:][agree]], axis=1)
        numbers, values = numbers[1:][~agree], values[1:][~agree]


def find_pairs(folders: list[Path], rank: int, num_ranks: int, threshold: float | None) -> tuple:
    """(exact, near): int64 [P, 2] pairs of documents, earlier and later, whose keys are in a rank's share of all."""
    index = _Index(folders)
    low, high = rank * 2**64 // num_ranks, (rank + 1) * 2**64 // num_ranks
    exact, near = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    for numbers in index.candidates(0, low, high):
        exact += _pairs(numbers, index.values(index.digests, numbers), 1.0)
    for column in range(1, 1 + _NUM_BANDS if threshold is not None else 1):
        for numbers in index.candidates(column, low, high):
            near += _pairs(numbers, index.values(index.signatures, numbers), threshold)
    return np.concatenate(exact), np.unique(np.concatenate(near), axis=0)


def resolve(num_documents: int, exact: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(duplicate, near duplicate): bool arrays over all documents; of those that pairs connect, the first stays."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.concatenate([exact, near])
    numbers, compact = np.unique(pairs, return_inverse=True)
    a, b = compact.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs), bool), (a, b)), shape=(len(numbers), len(numbers)))
    _, component = connected_components(graph, directed=False)
    _, firsts = np.unique(component, return_index=True)  # numbers ascend, so the first seen is the lowest
    is_exact, is_near = np.zeros(num_documents, bool), np.zeros(num_documents, bool)
    is_exact[exact[:, 1]] = True
    is_near[np.delete(numbers, firsts)] = True
    return is_exact, is_near & ~is_exact
