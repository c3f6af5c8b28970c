"""Damage of every kind to the files of a store is found, named, and never read as tokens."""

import random
from pathlib import Path

import numpy as np
import pytest

from k2jax.data.store import reader as module
from k2jax.data.store.manifest import CorruptStore
from k2jax.data.store.reader import TokenStore
from k2jax.data.store.writer import PartWriter, merge_parts
from k2jax.data.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    draw = random.Random(0)
    for part in range(2):
        writer = PartWriter(tmp_path / "store", part, load_tokenizer("byte"), shard_tokens=512, chunk_tokens=128)
        for i in range(40):
            for split, source in (("train", "web"), ("train", "code"), ("validation", "web")):
                writer.append(split, source, f"{part} {i}", "".join(draw.choices("abcdefgh", k=draw.randrange(5, 90))))
        writer.finish()
    merge_parts(tmp_path / "store", 2, load_tokenizer("byte"))
    return tmp_path / "store"


def read_all(folder):
    """Everything that training and audits read, in windows."""
    store, found = TokenStore(folder), []
    for streams in store.streams.values():
        for stream in streams.values():
            for start in range(0, stream.num_tokens, 100):
                stop = min(start + 101, stream.num_tokens)
                first, starts = stream.documents(start, stop)
                found.append((stream.read(start, stop).tolist(), first, starts.tolist()))
            found.append(stream.records(range(stream.num_documents)))
    return found


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and "parts" not in p.parts)


def refused(folder, name):
    with pytest.raises(CorruptStore) as error:
        read_all(folder)
    assert any(str(name) in problem for problem in error.value.problems), error.value


def test_fifty_bit_flips(folder):
    """In any file but the receipts, which nobody reads after the merge."""
    draw, expected = random.Random(1), read_all(folder)
    for path in draw.choices(files(folder), k=50):
        whole = path.read_bytes()
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        if path.name == "manifest.json":
            try:
                assert read_all(folder) == expected  # a blank for another blank
            except module.UserError as error:
                assert "manifest.json" in str(error) or "format" in str(error)
        else:
            refused(folder, path.relative_to(folder))
        path.write_bytes(whole)
    assert read_all(folder) == expected


def shards(folder):
    return [path for path in files(folder) if path.parent.name == "c"]


def test_truncated_missing_and_swapped_shards(folder):
    paths = shards(folder)
    assert len(paths) > 12
    for number, path in enumerate(paths):
        whole, other = path.read_bytes(), paths[number - 1]
        for content in (whole[: len(whole) // 2], whole[:-1], b"", whole + b"\0"):
            path.write_bytes(content)
            refused(folder, path.relative_to(folder))
        path.unlink()
        refused(folder, path.relative_to(folder))
        path.write_bytes(other.read_bytes())  # another shard in its place: every crc in it is right
        refused(folder, path.relative_to(folder))
        path.write_bytes(whole)


def crc32c(content: bytes) -> int:
    crc = 2**32 - 1
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 2**32 - 1


def swap_chunks(path: Path) -> bytes:
    """The shard with two entries of its index exchanged and the index's crc made right: chunks in another order."""
    content = bytearray(path.read_bytes())
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).copy()  # 4 chunks of (offset, bytes)
    index[[0, 1]] = index[[1, 0]]
    content[-68:-4] = index.tobytes()
    content[-4:] = crc32c(index.tobytes()).to_bytes(4, "little")
    return bytes(content)


def test_reordered_chunks_that_tensorstore_accepts(folder, monkeypatch):
    assert crc32c(b"123456789") == 0xE3069283  # the published check value
    path = folder / "train/web/00000/tokens/c/0"
    whole, expected = path.read_bytes(), TokenStore(folder).streams["train"]["web"].read(0, 512)
    path.write_bytes(swap_chunks(path))
    refused(folder, path.relative_to(folder))
    monkeypatch.setattr(module.VerifiedFolder, "verify", lambda self, name: None)  # what the digests are for
    silent = TokenStore(folder).streams["train"]["web"].read(0, 512)
    assert np.array_equal(silent[:128], expected[128:256]) and np.array_equal(silent[128:256], expected[:128])
    path.write_bytes(whole)
