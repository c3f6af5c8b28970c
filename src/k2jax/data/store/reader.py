"""The token store: a folder of token ids that any sequence length can read at random, and that notices damage.

manifest.json                what the folder holds, with a sha256 of every other file and of itself; written last
tokenizer.*                  the tokenizer's own file, where it has one
parts/PART.json              receipts of the writers, one for each part
SPLIT/SOURCE/PART/           SPLIT is train or validation; a stream is a split's parts of one source, one after the other
    tokens/                  zarr 3 array, uint32 [num_tokens], in shards of compressed chunks with crc32c
    borders.npy              uint64 [num_documents + 1]: where each document starts, and the end
    documents.npy            uint64 [num_documents, 3]: where its record begins, its id, and the id of its origin
    documents.jsonl          records: name, bytes and sha256 of its text; the same of the document it was made from

A document's id is the first 8 bytes of its sha256. The origin of a rephrased document is the one it was made from, of
any other itself.
"""

import bisect
import hashlib
import io
import itertools
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorstore

from k2jax.data.store.manifest import COUNTS, MEND, SPLITS, CorruptStore, VerifiedFolder, file_problems, parse_manifest
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import UserError
from k2jax.storage import PATIENT, Folder, shared_context

_CACHE_BYTES = 2**26  # decompressed chunks kept for the next read; a short sequence needs a sliver of one
_CACHED_INDEXES = 1024  # parts whose borders stay mapped, or in memory where the store is not on a local disk


class _Part:
    """One part of a stream: where it lies and how much it holds."""

    def __init__(self, files: VerifiedFolder, place: str, entry: dict, shard_tokens: int, context: tensorstore.Context):
        self.files, self.place, self.shard_tokens, self.context = files, place, shard_tokens, context
        self.num_tokens, self.num_documents = entry["tokens"], entry["documents"]
        self._opening = threading.Lock()

    @cached_property
    def _array(self) -> tensorstore.TensorStore:
        name = f"{self.place}/tokens"
        self.files.verify(f"{name}/zarr.json")
        # A store does not change: asking the file system about every cached chunk would only cost time.
        policy = {"fill_missing_data_reads": False, "recheck_cached_data": "open"}
        spec = {"driver": "zarr3", "kvstore": self.files.folder.spec(name), **policy}
        array = tensorstore.open(spec, open=True, read=True, context=self.context).result()
        if array.shape != (self.num_tokens,):
            found = f"{self.files.folder}/{name}: shape is {array.shape}"
            raise CorruptStore(f"{found}, the manifest says {self.num_tokens} tokens; {MEND}")
        return array

    def chunk(self, token: int) -> str:
        """The position of a token, for messages."""
        shard, rest = divmod(token, self.shard_tokens)
        return f"{self.files.folder}/{self.place}/tokens/c/{shard}, tokens from {rest}"

    def start(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        """Begin to read; what it gives waits for the tokens."""
        for number in range(start // self.shard_tokens, -(-stop // self.shard_tokens)):
            self.files.verify(f"{self.place}/tokens/c/{number}")
        with self._opening:
            array = self._array
        future = array[start:stop].read()

        def tokens() -> np.ndarray:
            try:
                return future.result()
            except ValueError as error:  # damaged since its digest was checked, or out of reach
                found = f"{self.files.folder}/{self.place}/tokens: tokens [{start}, {stop}) cannot be read: {error}"
                again = "" if self.files.folder.local else "; if the server did not answer, start again"
                raise CorruptStore(f"{found}; {MEND}{again}") from None

        return tokens

    def load_borders(self) -> np.ndarray:
        borders = self.files.npy(f"{self.place}/borders.npy")
        expected = (self.num_documents, self.num_tokens)
        if (found := (len(borders) - 1, int(borders[-1]))) != expected:
            place = f"{self.files.folder}/{self.place}/borders.npy"
            raise CorruptStore(f"{place}: (documents, tokens) are {found}, the manifest says {expected}; {MEND}")
        return borders

    def load_ids(self) -> np.ndarray:
        return self.files.npy(f"{self.place}/documents.npy")

    def records(self, documents: list[int]) -> Iterator[dict]:
        name, index = f"{self.place}/documents.jsonl", self.load_ids()
        self.files.verify(name)
        local = self.files.folder.local
        with open(local / name, "rb") if local else io.BytesIO(self.files.folder.read(name)) as file:
            for document in documents:
                file.seek(int(index[document, 0]))
                yield json.loads(file.readline())


class Recent:
    """The borders of the parts that were used last."""

    def __init__(self):
        self._kept, self._lock = OrderedDict(), threading.Lock()

    def borders(self, part) -> np.ndarray:
        with self._lock:
            if part in self._kept:
                self._kept.move_to_end(part)
                return self._kept[part]
        borders = part.load_borders()
        with self._lock:
            self._kept[part] = borders
            while len(self._kept) > _CACHED_INDEXES:
                self._kept.popitem(last=False)
        return borders


class Stream:
    """The documents of one source in one split, as one sequence of tokens. Tokens and documents count from 0."""

    def __init__(self, name: str, parts: list, counts: dict, recent: Recent):
        self.name, self.parts, self._recent = name, parts, recent
        self.num_tokens, self.num_documents, self._text_bytes = (counts[key] for key in COUNTS)
        self._first_token = [0, *itertools.accumulate(part.num_tokens for part in parts)]
        self._first_document = [0, *itertools.accumulate(part.num_documents for part in parts)]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents' text; bos and eos have none."""
        return self._text_bytes

    def _pieces(self, start: int, stop: int, firsts: list[int]) -> Iterator[tuple[int, int, int]]:
        """(part, start, stop) in the part, of every part that has some of [start, stop)."""
        number = bisect.bisect_right(firsts, start) - 1
        while start < stop:
            first, end = firsts[number], firsts[number + 1]
            if (until := min(stop, end)) > start:
                yield number, start - first, until - first
            start, number = max(start, until), number + 1

    def start(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        """`read` in two halves: several that have begun share the wait, which halves what they cost."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}): {self.name} has {self.num_tokens}")
        begun = [self.parts[number].start(a, b) for number, a, b in self._pieces(start, stop, self._first_token)]
        if len(begun) == 1:
            return begun[0]
        return lambda: np.concatenate([np.empty(0, np.uint32), *(tokens() for tokens in begun)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as uint32. IndexError outside the stream, CorruptStore for a damaged file."""
        return self.start(start, stop)()

    def documents(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """(number of the document that token `start` belongs to, int64 first tokens of it and all up to `stop`)."""
        first, starts = None, []
        for number, a, b in self._pieces(start, stop, self._first_token):
            borders = self._recent.borders(self.parts[number])
            # The needles are uint64 like the borders: for int64 ones numpy would convert every border to float64.
            low, high = np.searchsorted(borders, np.array([a + 1, b], np.uint64)) - [1, 0]
            starts.append(borders[low:high].astype(np.int64) + self._first_token[number])
            first = int(low) + self._first_document[number] if first is None else first
        return first, np.concatenate(starts)

    def first_tokens(self, ranges: list[tuple[int, int, int]]) -> np.ndarray:
        """int64: the places where ranges and the documents in them begin.

        ranges: (start, stop, place), tokens of the stream, of which token `start` is at `place`.
        """
        pieces = [
            (number, a, b, place - start)
            for start, stop, place in ranges
            for number, a, b in self._pieces(start, stop, self._first_token)
        ]
        number, low, high, shift = np.array(pieces, np.int64).reshape(-1, 4).T
        shift += np.array(self._first_token)[number]  # from a token of a part to its place
        found = [low + shift]
        for part in np.unique(number).tolist():
            borders, mine = self._recent.borders(self.parts[part]), number == part
            # All ranges of a part in one search: a batch has thousands. borders[first:end] begin inside (low, high); a
            # document that begins at low itself is in `found` already. For firsts 3, 9 and counts 2, 3 `inside` is
            # 3, 4, 9, 10, 11: arange(5) plus each first less the counts before it.
            needles = np.stack([low[mine] + 1, high[mine]]).astype(np.uint64)
            first, end = np.searchsorted(borders, needles)
            counts = end - first
            inside = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
            found.append(borders[inside].astype(np.int64) + np.repeat(shift[mine], counts))
        return np.concatenate(found)

    def borders(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first + 1]: first token of each document first..last-1, and the end of the last."""
        found = [
            self._recent.borders(self.parts[number])[a:b].astype(np.int64) + self._first_token[number]
            for number, a, b in self._pieces(first, last, self._first_document)
        ]
        end = self.num_tokens if last >= self.num_documents else None
        if end is None:
            ((number, a, _),) = self._pieces(last, last + 1, self._first_document)
            end = int(self._recent.borders(self.parts[number])[a]) + self._first_token[number]
        return np.concatenate([*found, [end]]).astype(np.int64)

    def chunk(self, token: int) -> str:
        """The file and the place in it where a token lies."""
        ((number, start, _),) = self._pieces(token, token + 1, self._first_token)
        return self.parts[number].chunk(start)

    def records(self, documents: list[int]) -> list[dict]:
        """The documents' records. documents: numbers, rising."""
        found, documents = [], np.asarray(documents, np.int64)
        for number, part in enumerate(self.parts):
            low, high = np.searchsorted(documents, self._first_document[number : number + 2])
            if low < high:
                found += part.records((documents[low:high] - self._first_document[number]).tolist())
        return found

    def find(self, prefix: str) -> Iterator[int]:
        """Documents, and those made from them, whose sha256 begins with `prefix`, at least 16 hex digits."""
        wanted = np.uint64(int(prefix[:16], 16))
        for number, part in enumerate(self.parts):
            hits = np.flatnonzero((np.asarray(part.load_ids()[:, 1:]) == wanted).any(-1))
            yield from (hits + self._first_document[number]).tolist()

    def find_name(self, name: str) -> Iterator[int]:
        """Documents called `name`: reads every record."""
        for number, part in enumerate(self.parts):
            for document, record in enumerate(part.records(range(part.num_documents))):
                if record["name"] == name:
                    yield document + self._first_document[number]


class TokenStore:
    """A store opened for reading, by any number of threads. UserError names everything a look at the folder shows.

    The content of a file is compared with its digest when it is first read, once for each TokenStore.
    streams: {split: {source: Stream}}. digest: of the manifest, and so of every byte in the store. validation_fraction:
    what its writer divided the documents by; None where the manifest does not say.
    """

    def __init__(self, path):
        folder = Folder(path)
        self.path = folder.url
        if folder.local is not None and not folder.local.is_dir():
            raise UserError(f"{self.path}: no such folder; make a token store with `k2jax prepare`")
        try:
            content = folder.read("manifest.json")
        except FileNotFoundError:
            folder.names()  # where there is no bucket either, s3 says so here alone
            rule = "is not a token store (no manifest.json); make one with `k2jax prepare`"
            raise UserError(f"{self.path}: {rule}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        self.manifest = parse_manifest(f"{self.path}/manifest.json", content)
        if problems := [*file_problems(folder, self.manifest["files"])]:
            raise CorruptStore(*problems)
        resources = PATIENT | {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
        context, shard = tensorstore.Context(resources, parent=shared_context()), self.manifest["shard_tokens"]
        self._files, recent = VerifiedFolder(Folder(path, context), self.manifest["files"]), Recent()
        self.sources = self.manifest["sources"]
        self.streams = {split: {} for split in SPLITS}
        for split, (source, entry) in itertools.product(SPLITS, self.sources.items()):
            counts, place = entry["splits"][split], f"{split}/{source}"
            parts = [_Part(self._files, f"{place}/{p['part']:05}", p, shard, context) for p in counts["parts"]]
            self.streams[split][source] = Stream(place, parts, counts, recent)
        self.vocab_size = self.manifest["tokenizer"]["vocab_size"]
        self.tokenizer_digest = self.manifest["tokenizer"]["digest"]
        self.validation_fraction = self.manifest.get("validation_fraction")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the store."""
        entry, folder = self.manifest["tokenizer"], self._files.folder
        if entry["file"] is not None:
            self._files.verify(entry["file"])
        if entry["file"] is None:
            tokenizer = load_tokenizer("byte")
        elif folder.local is not None:
            tokenizer = load_tokenizer(str(folder.local / entry["file"]))
        else:
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / entry["file"]
                path.write_bytes(folder.read(entry["file"]))
                tokenizer = load_tokenizer(str(path))
        if tokenizer.digest != entry["digest"]:
            raise CorruptStore(
                f"{self.path}: the tokenizer's digest is {tokenizer.digest}, the manifest says {entry['digest']}: "
                "this k2jax splits text otherwise than the one that prepared the store; prepare the store again"
            )
        return tokenizer
