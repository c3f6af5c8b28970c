"""Megatron's indexed datasets, PREFIX.bin and PREFIX.idx, as stores, read where they lie.

The .idx: b"MMIDIDX\\0\\0", version (u64), type code (u8), sequences (u64), documents + 1 (u64), then int32 lengths of the
sequences in tokens, int64 places of the sequences in bytes, int64 first sequences of the documents and the end, and in
files of later years one byte of mode per sequence. The .bin: token ids, nothing else.

The files carry no digests. At first use they are read once, and a sha256 of every block is kept in `index_dir`; from
then on every block is compared with it on first touch, and the digest of all is what a run's timeline names.
"""

import hashlib
import itertools
import json
import struct
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from k2jax.data.store.manifest import SPLITS, CorruptStore
from k2jax.data.store.reader import Recent, Stream
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import UserError
from k2jax.files import read_sealed, write_sealed

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# 9 and 10 are of forks whose vocabularies outgrew 16 bits.
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}
_BLOCK = 2**24  # bytes


def is_megatron(path: str) -> bool:
    return path.endswith(".idx")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """(dtype of the tokens, int64 [documents + 1] borders in tokens). UserError for what is no such file."""
    content = path.read_bytes()
    if content[:8] == b"TNTIDX\x00\x00":
        raise UserError(f"{path}: is of the older format TNTIDX; convert it to MMIDIDX with Megatron's tools")
    if len(content) < _HEADER.size or content[:9] != _MAGIC:
        raise UserError(f"{path}: is not a Megatron index (it does not begin with MMIDIDX)")
    _, version, code, num_sequences, num_borders = _HEADER.unpack_from(content)
    if version != 1 or code not in _TYPES:
        raise UserError(f"{path}: has version {version} and type code {code}; must be version 1 and one of {[*_TYPES]}")
    size = _HEADER.size + 12 * num_sequences + 8 * num_borders
    if len(content) not in (size, size + num_sequences):
        raise CorruptStore(f"{path}: has {len(content)} bytes; its header says {size}, or {size + num_sequences}")
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size).astype(np.int64)
    places = np.frombuffer(content, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_borders, _HEADER.size + 12 * num_sequences)
    ends, dtype = np.cumsum([0, *lengths]), np.dtype(_TYPES[code]).newbyteorder("<")
    if (lengths < 0).any() or not np.array_equal(places, ends[:-1] * dtype.itemsize):
        raise CorruptStore(f"{path}: its sequences do not lie one after the other from the beginning of the .bin file")
    if not num_borders or documents[0] or documents[-1] != num_sequences or (np.diff(documents) < 0).any():
        raise CorruptStore(f"{path}: its documents do not begin with sequence 0 and rise to {num_sequences}")
    return dtype, ends[documents]


def _block_digests(path: Path) -> list[str]:
    with open(path, "rb") as file:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(_BLOCK), b"")]


def _digests(index: Path, tokens: Path, index_dir: str) -> dict:
    """{"idx": sha256, "bin": sha256 of each block, "bytes": of the .bin}, as they were at first use."""
    kept = Path(index_dir) / f"{hashlib.sha256(str(tokens.absolute()).encode()).hexdigest()[:32]}.megatron"
    if kept.exists():
        digests = read_sealed(kept, "remove it, and begin new runs with these files")
        rule = f"if it was meant to change, remove {kept} and begin new runs with it"
        if (size := tokens.stat().st_size) != digests["bytes"]:
            raise CorruptStore(f"{tokens}: has {size} bytes, and had {digests['bytes']} at first use; {rule}")
        if (found := hashlib.sha256(index.read_bytes()).hexdigest()) != digests["idx"]:
            raise CorruptStore(f"{index}: sha256 is {found}, and was {digests['idx']} at first use; {rule}")
        return digests
    digests = {"idx": hashlib.sha256(index.read_bytes()).hexdigest(), "bin": _block_digests(tokens)}
    digests["bytes"] = tokens.stat().st_size
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(kept, digests)
    except OSError as error:
        raise UserError(f"data.index_dir: {kept} cannot be written: {error.strerror}; name another") from None
    return digests


def _as_ids(tokens: np.ndarray) -> np.ndarray:
    """uint32. What is below 0 or above 32 bits becomes the highest one, which no vocabulary has."""
    ids, highest = tokens.astype(np.uint32), 2**32 - 1
    if tokens.dtype.itemsize == 8 or tokens.dtype.kind == "i":
        ids[(tokens < 0) | (tokens > highest)] = highest
    return ids


class _Part:
    """The one part of the stream: all documents of the file."""

    def __init__(self, path: Path, dtype: np.dtype, borders: np.ndarray, blocks: list[str]):
        self.path, self.dtype, self._borders, self._blocks = path, dtype, borders, blocks
        self.num_tokens, self.num_documents = int(borders[-1]), len(borders) - 1
        # numpy maps no empty file
        self._tokens = np.memmap(path, dtype, "r") if self.num_tokens else np.empty(0, dtype)
        self._verified, self._lock = set(), threading.Lock()

    def _verify(self, block: int) -> None:
        with self._lock:
            if block in self._verified:
                return
            with open(self.path, "rb") as file:
                file.seek(block * _BLOCK)
                found = hashlib.sha256(file.read(_BLOCK)).hexdigest()
            if found != self._blocks[block]:
                where = f"bytes {block * _BLOCK} to {(block + 1) * _BLOCK}"
                raise CorruptStore(f"{self.path}: {where}: sha256 is {found}, and was {self._blocks[block]}")
            self._verified.add(block)

    def start(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        size = self.dtype.itemsize
        for block in range(start * size // _BLOCK, -(-stop * size // _BLOCK)):
            if block not in self._verified:
                self._verify(block)
        return lambda: _as_ids(self._tokens[start:stop])

    def chunk(self, token: int) -> str:
        return f"{self.path}, byte {token * self.dtype.itemsize}"

    def load_borders(self) -> np.ndarray:
        return self._borders.astype(np.uint64)

    def record(self, document: int) -> dict:
        return {"name": f"{self.path.stem}#{document}"}

    def records(self, documents) -> list[dict]:
        return [self.record(document) for document in documents]


class _FileStream(Stream):
    """Documents have names, FILE#NUMBER, and no digests of their text, as the files do not keep it."""

    tokenizer: Tokenizer | None = None

    @cached_property
    def text_bytes(self) -> int:
        """Of all documents, decoded; the files do not say. UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.parts[0].path}: how many bytes of text it is, is not known; give data.tokenizer, or held-out "
                "text of another kind as data.validation_path"
            )
        return sum(
            len(
                self.tokenizer.decode(
                    [i for i in self.read(a, b).tolist() if i not in self.tokenizer.specials]
                ).encode()
            )
            for a, b in itertools.pairwise(self.borders(0, self.num_documents).tolist())
        )

    def find(self, prefix: str):
        return iter(())

    def find_name(self, name: str):
        stem, _, number = name.rpartition("#")
        if stem == self.parts[0].path.stem and number.isdecimal() and int(number) < self.num_documents:
            yield int(number)


class MegatronStore:
    """A pair of files as a store of one source, named as they are; all in the training split.

    tokenizer: what wrote the files ("byte", FILE.tiktoken, tokenizer.json), which they do not say; without it nothing
    can be decoded, and loss not be given in bits per byte.
    """

    validation_fraction = None

    def __init__(self, path: str, tokenizer: str | None, index_dir: str):
        index, self.path = Path(path), path
        tokens = index.with_suffix(".bin")
        if missing := [f"{file}: no such file" for file in (index, tokens) if not file.is_file()]:
            raise UserError(*missing)
        dtype, borders = _read_index(index)
        if (size := tokens.stat().st_size) != (said := int(borders[-1]) * dtype.itemsize):
            raise CorruptStore(f"{tokens}: has {size} bytes, {index.name} says {said}")
        digests = _digests(index, tokens, index_dir)
        self.digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        self._tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self.tokenizer_digest = self._tokenizer.digest if self._tokenizer else "unknown"
        self.vocab_size = self._tokenizer.vocab_size if self._tokenizer else 1
        part = _Part(tokens, dtype, borders, digests["bin"])
        counts = {"tokens": part.num_tokens, "documents": part.num_documents, "text_bytes": 0}
        name = index.stem.replace(" ", "_").replace("=", "_")
        self.sources = {name: {"derived_from": None, "variants": 0}}
        self.streams = {split: {} for split in SPLITS}
        stream = self.streams["train"][name] = _FileStream(f"train/{name}", [part], counts, Recent())
        stream.tokenizer = self._tokenizer

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer
