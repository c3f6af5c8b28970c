"""The token store: a folder of token ids that any sequence length can read at random, and that notices damage.

manifest.json                what the folder holds, with a sha256 of every other file; written last
tokenizer.*                  the tokenizer's own file, where it has one
train/, validation/
    tokens/                  zarr 3 array, uint32 [num_tokens], in shards of compressed chunks with crc32c
    borders.npy              uint64 [num_documents + 1]: where each document starts, and the end
    documents.jsonl          per document: name, bytes and sha256 of its text
"""

import array
import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import tensorstore

from k2jax.config import UserError
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.files import sha256_of, sync_folder, write_atomic

FORMAT = 1
SPLITS = ("train", "validation")
_COUNTS = ("tokens", "documents", "text_bytes")
SHARD_TOKENS, CHUNK_TOKENS = 2**24, 2**16
_CACHE_BYTES = 2**28  # decompressed chunks kept for the next read; a short sequence needs a sliver of one
_MEND = "restore the file from a copy, or prepare the store again"


class CorruptStore(UserError):
    """The store's files are not those that were written."""


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _create_array(path: Path, shard_tokens: int, chunk_tokens: int) -> tensorstore.TensorStore:
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    chunk_codecs = [endian, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk_tokens], "codecs": chunk_codecs, "index_codecs": [endian, {"name": "crc32c"}]}
    metadata = {
        "shape": [0],
        "data_type": "uint32",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_tokens]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    # By default a chunk of zeros is left out, and a lost chunk reads as zeros: the two could not be told apart.
    policy = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata, **policy}
    return tensorstore.open(spec, create=True).result()


class _SplitWriter:
    """One split of a store being written. Memory: one shard, and 8 bytes per document."""

    def __init__(self, folder: Path, shard_tokens: int, chunk_tokens: int):
        folder.mkdir()
        self.folder = folder
        self.array = _create_array(folder / "tokens", shard_tokens, chunk_tokens)
        self.buffer = np.empty(shard_tokens, np.uint32)
        self.filled = self.text_bytes = 0
        self.borders = array.array("Q", [0])
        self.documents = open(folder / "documents.jsonl", "w", encoding="utf-8")

    def append(self, tokens: np.ndarray, document: dict) -> None:
        assert len(tokens), "a document without tokens would have no border of its own"
        self.borders.append(self.borders[-1] + len(tokens))
        self.text_bytes += document["bytes"]
        self.documents.write(json.dumps(document) + "\n")
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        start = self.array.shape[0]
        self.array = self.array.resize(exclusive_max=[start + self.filled]).result()
        self.array[start:].write(self.buffer[: self.filled]).result()
        self.filled = 0

    def finish(self) -> dict:
        if self.filled:
            self.flush()
        self.documents.flush()
        os.fsync(self.documents.fileno())
        with open(self.folder / "borders.npy", "wb") as file:
            np.save(file, np.frombuffer(self.borders, np.uint64))
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": self.borders[-1], "documents": len(self.borders) - 1, "text_bytes": self.text_bytes}


class TokenWriter:
    """Writes a store into `folder`, which must be empty. It becomes one when `finish` writes the manifest.

    Memory: one shard per split, 4 * shard_tokens bytes, and 8 bytes per document.
    """

    def __init__(self, folder, tokenizer: Tokenizer, *, shard_tokens=SHARD_TOKENS, chunk_tokens=CHUNK_TOKENS):
        if chunk_tokens < 1 or shard_tokens < 1 or shard_tokens % chunk_tokens:
            raise ValueError(f"{shard_tokens = }: must be a positive multiple of {chunk_tokens = }")
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.sizes = {"shard_tokens": shard_tokens, "chunk_tokens": chunk_tokens}
        self.splits = {split: _SplitWriter(self.folder / split, **self.sizes) for split in SPLITS}

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *exception) -> None:
        for split in self.splits.values():
            split.documents.close()

    def append(self, split: str, name: str, text: str) -> int:
        """Add one document: bos, the tokens of `text`, eos. Gives its UTF-8 bytes."""
        content, tokenizer = text.encode("utf-8"), self.tokenizer
        bos, eos = np.array([tokenizer.bos, tokenizer.eos], np.uint32)[:, None]
        tokens = np.concatenate([bos, tokenizer.encode(text), eos])
        document = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.splits[split].append(tokens, document)
        return len(content)

    def finish(self, **created) -> dict:
        """Write the manifest and return it. `created`: JSON values for it that say where the documents came from."""
        splits = {name: split.finish() for name, split in self.splits.items()}
        tokenizer = self.tokenizer
        if tokenizer.definition is not None:
            write_atomic(self.folder / tokenizer.file_name, tokenizer.definition)
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            **created,
            **self.sizes,
            "tokenizer": {
                "spec": tokenizer.spec,
                "file": tokenizer.file_name,
                "digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
            },
            "splits": splits,
            "files": {path.relative_to(self.folder).as_posix(): _describe(path) for path in paths},
        }
        for folder in {path.parent for path in paths}:
            sync_folder(folder)
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        return manifest


def _parse_manifest(path: Path, content: bytes) -> dict:
    """The manifest's values, with the types that the store relies on."""
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            found = f"{path}: format is {manifest['format']!r}"
            raise UserError(f"{found}, this k2jax reads format {FORMAT}; prepare the store again")
        counts = [manifest["splits"][split][key] for split in SPLITS for key in _COUNTS]
        counts += [manifest["shard_tokens"], manifest["chunk_tokens"], manifest["tokenizer"]["vocab_size"]]
        counts += [entry["bytes"] for entry in manifest["files"].values()]
        texts = [manifest["tokenizer"]["digest"], *(entry["sha256"] for entry in manifest["files"].values())]
        if {*map(type, counts)} != {int} or {*map(type, texts)} != {str} or min(counts) < 0:
            raise ValueError("a count is not an integer of at least 0, or a digest not text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{path}: is not a manifest of k2jax ({type(error).__name__}: {error}); {_MEND}") from None
    return manifest


def _file_problems(folder: Path, files: dict):
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: is missing; {_MEND}"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{path}: has {path.stat().st_size} bytes, the manifest says {entry['bytes']}; {_MEND}"


class TokenStore:
    """A store opened for reading, by any number of threads. UserError names everything a look at the folder shows.

    The content of a file is compared with its digest when it is first read, once for each TokenStore.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder; make a token store with `k2jax prepare`")
        if not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path}: is no token store, it has no manifest.json; make one with `k2jax prepare`")
        content = (self.path / "manifest.json").read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        self.manifest = _parse_manifest(self.path / "manifest.json", content)
        problems = [*_file_problems(self.path, self.manifest["files"])]
        if problems:
            raise CorruptStore(*problems)
        self._borders, self._verified, self._locks = {}, set(), [threading.Lock() for _ in range(64)]
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._arrays = {split: self._open(split, context) for split in SPLITS}

    def _open(self, split: str, context: tensorstore.Context) -> tensorstore.TensorStore:
        self._verify(f"{split}/tokens/zarr.json")
        kvstore = {"driver": "file", "path": f"{self.path / split / 'tokens'}/"}
        # A store does not change: asking the file system about every cached chunk would only cost time.
        spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False, "recheck_cached_data": "open"}
        array = tensorstore.open(spec, open=True, read=True, context=context).result()
        if array.shape != (self.num_tokens(split),):
            found = f"{self.path}/{split}/tokens: shape is {array.shape}"
            raise CorruptStore(f"{found}, the manifest says {self.num_tokens(split)} tokens; {_MEND}")
        return array

    def _verify(self, name: str) -> None:
        """Compare a file with its digest in the manifest, the first time it is named."""
        if name in self._verified:
            return
        with self._locks[hash(name) % len(self._locks)]:
            if name in self._verified:
                return
            path, entry = self.path / name, self.manifest["files"].get(name)
            if entry is None:
                raise CorruptStore(f"{path}: is not in the manifest; {_MEND}")
            try:
                found = sha256_of(path)
            except OSError as error:
                raise CorruptStore(f"{path}: cannot be read: {error.strerror}; {_MEND}") from None
            if found != entry["sha256"]:
                raise CorruptStore(f"{path}: sha256 is {found}, the manifest says {entry['sha256']}; {_MEND}")
            self._verified.add(name)

    def num_tokens(self, split: str) -> int:
        return self.manifest["splits"][split]["tokens"]

    def num_documents(self, split: str) -> int:
        return self.manifest["splits"][split]["documents"]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the documents' text; bos and eos have none."""
        return self.manifest["splits"][split]["text_bytes"]

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 as uint32. IndexError outside the split, CorruptStore for a damaged file."""
        if not 0 <= start <= stop <= self.num_tokens(split):
            raise IndexError(f"tokens [{start}, {stop}): {split} has {self.num_tokens(split)}")
        shard = self.manifest["shard_tokens"]
        for number in range(start // shard, -(-stop // shard)):
            self._verify(f"{split}/tokens/c/{number}")
        try:
            return self._arrays[split][start:stop].read().result()
        except ValueError as error:  # damaged since its digest was checked
            found = f"{self.path}/{split}/tokens: tokens [{start}, {stop}) cannot be read: {error}"
            raise CorruptStore(f"{found}; {_MEND}") from None

    def borders(self, split: str) -> np.ndarray:
        """uint64 [num_documents + 1]: the first token of each document, then num_tokens; mapped, not loaded."""
        if split not in self._borders:
            self._verify(f"{split}/borders.npy")
            path = self.path / split / "borders.npy"
            borders = np.load(path, mmap_mode="r")
            expected = (self.num_documents(split), self.num_tokens(split))
            if (found := (len(borders) - 1, int(borders[-1]))) != expected:
                raise CorruptStore(f"{path}: (documents, tokens) are {found}, the manifest says {expected}; {_MEND}")
            self._borders[split] = borders
        return self._borders[split]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the store."""
        entry = self.manifest["tokenizer"]
        if entry["file"] is not None:
            self._verify(entry["file"])
        tokenizer = load_tokenizer("byte" if entry["file"] is None else str(self.path / entry["file"]))
        if tokenizer.digest != entry["digest"]:
            raise CorruptStore(
                f"{self.path}: the tokenizer's digest is {tokenizer.digest}, the manifest says {entry['digest']}: "
                "this k2jax splits text otherwise than the one that prepared the store; prepare the store again"
            )
        return tokenizer
