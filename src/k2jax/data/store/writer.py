"""Writing a token store (the layout is in reader.py): parts by any number of workers, then one manifest.

A part is written whole by one worker, with a folder of its own in every stream, and exists once its receipt does. What
a part holds is for its writer to fix by its number; so the store has the same bytes however many workers there were,
and however often one was killed and its part written again.
"""

import array
import hashlib
import io
import json

import numpy as np
import tensorstore

from k2jax.data.store.manifest import CHUNK_TOKENS, FORMAT, MEND, SHARD_TOKENS, SPLITS
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import UserError
from k2jax.files import parse_json, sealed, sync_file, unsealed
from k2jax.storage import Folder, shared_context

PART_TOKENS = 2**30
DEFAULT_SOURCE = "text"
_COUNTS = ("tokens", "documents", "text_bytes")


def _create_array(folder: Folder, name: str, shard_tokens: int, chunk_tokens: int) -> tensorstore.TensorStore:
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
    spec = {"driver": "zarr3", "kvstore": folder.spec(name), "metadata": metadata, **policy}
    return tensorstore.open(spec, create=True, context=shared_context()).result()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _receipt_name(part: int) -> str:
    return f"parts/{part:05}.json"


class _StreamWriter:
    """One stream's share of a part. Memory: one shard, and some 200 bytes per document."""

    def __init__(self, folder: Folder, place: str, shard_tokens: int, chunk_tokens: int):
        self.folder, self.place = folder, place
        self.array = _create_array(folder, f"{place}/tokens", shard_tokens, chunk_tokens)
        self.buffer = np.empty(shard_tokens, np.uint32)
        self.filled = self.text_bytes = self.derived = 0
        self.borders, self.index, self.records = array.array("Q", [0]), array.array("Q"), io.BytesIO()

    def append(self, tokens: np.ndarray, record: dict) -> None:
        self.borders.append(self.borders[-1] + len(tokens))
        origin = record.get("origin", record)["sha256"]
        self.index.extend([self.records.tell(), int(record["sha256"][:16], 16), int(origin[:16], 16)])
        self.records.write((json.dumps(record) + "\n").encode())
        self.text_bytes += record["bytes"]
        self.derived += "origin" in record
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
        self.folder.write(f"{self.place}/borders.npy", _npy(np.frombuffer(self.borders, np.uint64)))
        self.folder.write(f"{self.place}/documents.npy", _npy(np.frombuffer(self.index, np.uint64).reshape(-1, 3)))
        self.folder.write(f"{self.place}/documents.jsonl", self.records.getvalue())
        counts = {"tokens": self.borders[-1], "documents": len(self.borders) - 1, "text_bytes": self.text_bytes}
        return counts | {"derived": self.derived}


class PartWriter:
    """Writes part number `part` of the store at `folder`, a path or URL, from its beginning: what lay there is removed.

    Give every document of the part in an order that does not change from one run to another, then `finish`. Memory: a
    shard, 4 * shard_tokens bytes, and 200 bytes per document, for each stream (split and source) of the part.
    """

    def __init__(
        self, folder, part: int, tokenizer: Tokenizer, *, shard_tokens=SHARD_TOKENS, chunk_tokens=CHUNK_TOKENS
    ):
        if chunk_tokens < 1 or shard_tokens < 1 or shard_tokens % chunk_tokens:
            raise ValueError(f"{shard_tokens = }: must be a positive multiple of {chunk_tokens = }")
        if not 0 <= part < 100_000:
            raise ValueError(f"{part = }: must be from 0 to 99999, as its name has five digits")
        self.folder, self.part, self.tokenizer = Folder(folder), part, tokenizer
        self.sizes = {"shard_tokens": shard_tokens, "chunk_tokens": chunk_tokens}
        self.num_tokens, self._streams = 0, {}
        self.folder.delete(_receipt_name(part))  # first of all: from here to `finish` there is no such part

    def append_tokens(self, split: str, source: str, tokens: np.ndarray, record: dict) -> None:
        """Add one document as it shall be stored, bos and eos included.

        record: {"name", "bytes", "sha256"} of its text; that of a rephrased one has {"origin": {"name", "sha256"}} of
        the document it was made from. Every source is all rephrased or not at all.
        """
        if not len(tokens):
            raise ValueError(f"{record['name']}: has no tokens; a document without any would have no border of its own")
        if split not in SPLITS or not source or "/" in source or any(c in source for c in " =,"):
            raise ValueError(f"{split = }, {source = }: must be one of {SPLITS}, and a name without / = , and spaces")
        if (stream := self._streams.get((split, source))) is None:
            place = f"{split}/{source}/{self.part:05}"
            self.folder.remove(f"{place}/")
            stream = self._streams[split, source] = _StreamWriter(self.folder, place, **self.sizes)
        stream.append(np.asarray(tokens, np.uint32), record)
        self.num_tokens += len(tokens)

    def append(self, split: str, source: str, name: str, text: str, origin: dict | None = None) -> int:
        """Add one document: bos, the tokens of `text`, eos. Gives its UTF-8 bytes. origin: as in `append_tokens`."""
        content, tokenizer = text.encode("utf-8"), self.tokenizer
        bos, eos = np.array([tokenizer.bos, tokenizer.eos], np.uint32)[:, None]
        record = {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record |= {"origin": origin} if origin else {}
        self.append_tokens(split, source, np.concatenate([bos, tokenizer.encode(text), eos]), record)
        return len(content)

    def finish(self) -> dict:
        """Write the part's receipt, which makes it exist, and return it. A part may be empty."""
        counts = {f"{split}/{source}": self._streams[split, source].finish() for split, source in sorted(self._streams)}
        names = [name for place in counts for name in self.folder.names(f"{place}/{self.part:05}/")]
        if self.folder.local is not None:
            for path in {(self.folder.local / name).parent for name in names}:
                sync_file(path)
        receipt = {
            "part": self.part,
            "tokenizer": self.tokenizer.digest,
            **self.sizes,
            "streams": counts,
            "files": {name: self.folder.describe(name) for name in names},
        }
        self.folder.write(_receipt_name(self.part), json.dumps(sealed(receipt), indent=1) + "\n")
        return receipt


def finished_part(folder, part: int) -> dict | None:
    """The receipt of a part that has been written whole, or None. UserError if it was changed since."""
    folder, name = Folder(folder), _receipt_name(part)
    try:
        content = folder.read(name)
    except FileNotFoundError:
        return None
    return unsealed(f"{folder}/{name}", parse_json(f"{folder}/{name}", content, MEND), MEND)


def _merge_problems(receipts: list[dict], tokenizer: Tokenizer, sources: dict[str, dict]):
    sizes = {(receipt["shard_tokens"], receipt["chunk_tokens"]) for receipt in receipts}
    if len(sizes) > 1:
        yield f"parts: were written with several (shard_tokens, chunk_tokens), {sorted(sizes)}; write them again alike"
    for receipt in receipts:
        if receipt["tokenizer"] != tokenizer.digest:
            yield f"part {receipt['part']}: was written with another tokenizer; write it again"
        for place, counts in receipt["streams"].items():
            source = place.split("/")[1]
            origin = sources.get(source, {}).get("derived_from")
            if counts["derived"] != (counts["documents"] if origin else 0):
                rule = f"of {counts['documents']} documents {counts['derived']} are rephrased ones"
                yield f"part {receipt['part']}: {place}: {rule}; give them a source of their own, with derived_from"


def _sources_entry(receipts: list[dict], sources: dict[str, dict]) -> dict:
    """{source: {"derived_from", "variants", "splits": {split: {counts..., "parts": [...]}}}}, all sorted by name."""
    names = sorted({place.split("/")[1] for receipt in receipts for place in receipt["streams"]})
    table = {}
    for name in names:
        splits = {}
        for split in SPLITS:
            parts = [
                {"part": receipt["part"], **{key: counts[key] for key in _COUNTS}}
                for receipt in receipts
                if (counts := receipt["streams"].get(f"{split}/{name}"))
            ]
            splits[split] = {key: sum(part[key] for part in parts) for key in _COUNTS} | {"parts": parts}
        declared = sources.get(name, {})
        origin, variants = declared.get("derived_from"), declared.get("variants", 1)
        table[name] = {"derived_from": origin, "variants": variants if origin else 0, "splits": splits}
    return table


def merge_parts(
    folder, num_parts: int, tokenizer: Tokenizer, sources: dict[str, dict] | None = None, **created
) -> dict:
    """Make the parts 0..num_parts-1 at `folder` one store: write its manifest and return it.

    sources: {name: {"derived_from": name of the source whose documents were rephrased, "variants": at most how many of
    each}} of the sources that were rephrased. created: JSON values for the manifest that say where the documents came
    from; nothing in them may hang on time, place or number of workers. Where the hash of the text divided them,
    validation_fraction is to be among them: stores that a run joins are compared by it. UserError if a part is missing
    or unfit.
    """
    folder, sources = Folder(folder), sources or {}
    receipts = [finished_part(folder.url, part) for part in range(num_parts)]
    missing = [str(part) for part, receipt in enumerate(receipts) if receipt is None]
    if missing:
        raise UserError(f"{folder}: parts {', '.join(missing[:20])} have not been written; run the preparation again")
    if problems := [*_merge_problems(receipts, tokenizer, sources)]:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    table = _sources_entry(receipts, sources)
    if tokenizer.definition is not None:
        folder.write(tokenizer.file_name, tokenizer.definition)
    files = {name: entry for receipt in receipts for name, entry in receipt["files"].items()}
    names = [_receipt_name(part) for part in range(num_parts)] + [tokenizer.file_name] * bool(tokenizer.file_name)
    files |= {name: folder.describe(name) for name in names}
    manifest = {
        "format": FORMAT,
        **created,
        "shard_tokens": receipts[0]["shard_tokens"],
        "chunk_tokens": receipts[0]["chunk_tokens"],
        "tokenizer": {
            "spec": tokenizer.spec,
            "file": tokenizer.file_name,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
        },
        "splits": {
            split: {key: sum(entry["splits"][split][key] for entry in table.values()) for key in _COUNTS}
            for split in SPLITS
        },
        "sources": table,
        "files": dict(sorted(files.items())),
    }
    manifest = sealed(manifest)
    folder.write("manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest
