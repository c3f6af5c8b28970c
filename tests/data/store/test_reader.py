"""The token store: what is written is read, and damage is named."""

import gc
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from token_writer import TokenWriter

from k2jax import storage as folder_module
from k2jax.data.store import reader as module
from k2jax.data.store.manifest import CorruptStore
from k2jax.data.store.reader import TokenStore
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import UserError
from k2jax.files import sealed, sha256_of

SHARD, CHUNK = 64, 16
MEND = "restore the file from a copy, or prepare the store again"


def texts(split):
    rng = np.random.default_rng(len(split))
    lengths = [62, 1, 200, 13, *rng.integers(1, 90, 20)] if split == "train" else [5, 70]
    return ["".join(chr(c) for c in rng.choice([0, 97, 98, 233, 0x6F22], n)) for n in lengths]


def write(folder, tokenizer):
    folder.mkdir()
    writer = TokenWriter(folder, tokenizer, shard_tokens=SHARD, chunk_tokens=CHUNK)
    for split in ("train", "validation"):
        for i, text in enumerate(texts(split)):
            assert writer.append(split, f"{split} {i}", text) == len(text.encode())
    writer.finish(source=["test"])
    return folder


def plain(split, tokenizer):
    return np.concatenate([[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts(split)])


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store", load_tokenizer("byte"))


def test_round_trip(folder):
    store, tokenizer = TokenStore(folder), load_tokenizer("byte")
    for split in ("train", "validation"):
        expected = plain(split, tokenizer)
        assert store.streams[split]["text"].num_tokens == len(expected) and store.streams[split][
            "text"
        ].num_documents == len(texts(split))
        assert store.streams[split]["text"].text_bytes == sum(len(text.encode()) for text in texts(split))
        found = store.streams[split]["text"].read(0, len(expected))
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, expected)
        borders = store.streams[split]["text"].borders(0, len(texts(split)))
        assert borders.dtype == np.int64
        np.testing.assert_array_equal(borders, [*np.flatnonzero(expected == tokenizer.bos), len(expected)])
    assert (
        store.streams["train"]["text"].num_tokens > 4 * SHARD and store.streams["train"]["text"].num_tokens % SHARD
    )  # the last shard is not full


def test_every_range_across_a_shard_border(folder):
    store, expected = TokenStore(folder), plain("train", load_tokenizer("byte"))
    for start in range(SHARD - 20, SHARD + 3):
        for stop in [*range(start, SHARD + 20), 3 * SHARD, 3 * SHARD + 1]:
            np.testing.assert_array_equal(store.streams["train"]["text"].read(start, stop), expected[start:stop])
    for start, stop in ((-1, 3), (3, 2), (0, len(expected) + 1)):
        with pytest.raises(IndexError, match=f"train/text has {len(expected)}"):
            store.streams["train"]["text"].read(start, stop)


def test_shards_that_end_exactly_and_zeros_are_stored(tmp_path):
    (tmp_path / "store").mkdir()
    writer = TokenWriter(tmp_path / "store", load_tokenizer("byte"), shard_tokens=SHARD, chunk_tokens=CHUNK)
    writer.append("train", "a", "\0" * (2 * SHARD - 2))
    writer.finish()
    store = TokenStore(tmp_path / "store")
    assert store.streams["train"]["text"].read(1, 2 * SHARD - 1).tolist() == [0] * (2 * SHARD - 2)
    assert store.streams["validation"]["text"].num_tokens == 0 and store.streams["validation"]["text"].borders(
        0, 0
    ).tolist() == [0]
    assert store.streams["validation"]["text"].read(0, 0).shape == (0,)
    assert [name for name in store.manifest["files"] if "tokens/c/" in name] == [
        f"train/text/00000/tokens/c/{i}" for i in (0, 1)
    ]


def test_documents_file(folder):
    lines = [json.loads(line) for line in (folder / "train/text/00000/documents.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"train {i}" for i in range(len(texts("train")))]
    assert [line["bytes"] for line in lines] == [len(text.encode()) for text in texts("train")]


def test_same_documents_same_digest(folder, tmp_path):
    assert TokenStore(folder).digest == TokenStore(write(tmp_path / "again", load_tokenizer("byte"))).digest


def test_tokenizer_travels_with_the_store(tmp_path):
    trained = train_bpe(iter(["abab ab"] * 9), 270)
    store = TokenStore(write(tmp_path / "store", trained))
    assert store.tokenizer().encode("abab").tolist() == trained.encode("abab").tolist()
    np.testing.assert_array_equal(
        store.streams["train"]["text"].read(0, store.streams["train"]["text"].num_tokens), plain("train", trained)
    )
    path = tmp_path / "store/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<|bos|>", b"<|b0s|>"))
    with pytest.raises(CorruptStore, match="tokenizer.json: sha256 is"):
        TokenStore(tmp_path / "store").tokenizer()


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path, monkeypatch):
    store = TokenStore(write(tmp_path / "store", train_bpe(iter(["abab ab"] * 9), 270)))
    monkeypatch.setattr("k2jax.data.tokenizer.PRE_SPLIT", r"\s+")
    with pytest.raises(CorruptStore, match="splits text otherwise than the one that prepared the store"):
        store.tokenizer()


def flip(path, offset=-1):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
def test_bit_flip_is_named(folder, place):
    path = folder / "train/text/00000/tokens/c/2"
    expected = TokenStore(folder).manifest["files"]["train/text/00000/tokens/c/2"]["sha256"]
    flip(path, int(place * path.stat().st_size))
    store = TokenStore(folder)
    store.streams["train"]["text"].read(0, 2 * SHARD)  # the shards before are whole
    with pytest.raises(CorruptStore) as error:
        store.streams["train"]["text"].read(2 * SHARD - 1, 2 * SHARD + 1)
    assert str(error.value) == f"{path}: sha256 is {sha256_of(path)}, the manifest says {expected}; {MEND}"


def test_swapped_shards_are_named(folder):
    a, b, c = (folder / f"train/text/00000/tokens/c/{name}" for name in (0, 1, "x"))
    a.rename(c), b.rename(a), c.rename(b)
    with pytest.raises(CorruptStore):  # by size at once, or by digest at the first read
        TokenStore(folder).streams["train"]["text"].read(0, 1)


def test_swapped_shards_of_one_size_are_named(tmp_path):
    (tmp_path / "store").mkdir()
    writer = TokenWriter(tmp_path / "store", load_tokenizer("byte"), shard_tokens=SHARD, chunk_tokens=CHUNK)
    writer.append("train", "a", "a" * (SHARD - 2)), writer.append("train", "b", "b" * (SHARD - 2))
    writer.finish()
    a, b, c = (tmp_path / f"store/train/text/00000/tokens/c/{name}" for name in (0, 1, "x"))
    assert a.stat().st_size == b.stat().st_size
    a.rename(c), b.rename(a), c.rename(b)
    with pytest.raises(CorruptStore, match="c/1: sha256 is"):
        TokenStore(tmp_path / "store").streams["train"]["text"].read(SHARD, SHARD + 1)


def test_damage_after_the_first_touch_is_caught_by_the_chunks(folder, monkeypatch):
    monkeypatch.setattr(module, "_CACHE_BYTES", 0)
    path, store = folder / "train/text/00000/tokens/c/1", TokenStore(folder)
    store.streams["train"]["text"].read(SHARD, 2 * SHARD)
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset)
        with pytest.raises(CorruptStore, match=r"train/text/00000/tokens: tokens \[64, 128\) cannot be read: "):
            store.streams["train"]["text"].read(SHARD, 2 * SHARD)
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(CorruptStore, match="cannot be read"):
        store.streams["train"]["text"].read(SHARD, 2 * SHARD)
    path.write_bytes(whole)
    time.sleep(0.1)  # TensorStore takes a chunk that was missing for missing still within the tick of a coarse clock
    store.streams["train"]["text"].read(SHARD, 2 * SHARD)


def test_a_lost_file_is_never_zeros(folder):
    store = TokenStore(folder)
    (folder / "train/text/00000/tokens/c/1").unlink()
    with pytest.raises(CorruptStore, match="c/1: cannot be read: No such file"):
        store.streams["train"]["text"].read(SHARD, SHARD + 1)


def test_open_names_every_missing_and_resized_file(folder):
    (folder / "train/text/00000/tokens/c/1").unlink()
    (folder / "validation/text/00000/borders.npy").unlink()
    with open(folder / "train/text/00000/tokens/c/3", "ab") as file:
        file.write(b"x")
    size = (folder / "train/text/00000/tokens/c/3").stat().st_size
    with pytest.raises(CorruptStore) as error:
        TokenStore(folder)
    assert error.value.problems == (
        f"{folder}/train/text/00000/tokens/c/1: is missing; {MEND}",
        f"{folder}/train/text/00000/tokens/c/3: has {size} bytes, the manifest says {size - 1}; {MEND}",
        f"{folder}/validation/text/00000/borders.npy: is missing; {MEND}",
    )


@pytest.mark.parametrize("name", ["train/text/00000/tokens/zarr.json", "train/text/00000/borders.npy"])
def test_flip_in_a_small_file(folder, name):
    flip(folder / name)
    with pytest.raises(CorruptStore, match=f"{name}: sha256 is"):
        stream = TokenStore(folder).streams["train"]["text"]
        stream.read(0, 1), stream.documents(0, 1)


def test_not_a_store(tmp_path, folder):
    with pytest.raises(UserError) as error:
        TokenStore(tmp_path / "none")
    assert str(error.value) == f"{tmp_path}/none: no such folder; make a token store with `k2jax prepare`"
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        TokenStore(folder)
    assert str(error.value) == f"{folder}: is not a token store (no manifest.json); make one with `k2jax prepare`"


def test_damaged_manifests(folder):
    path = folder / "manifest.json"
    whole = path.read_text()

    def signed(text):
        manifest = json.loads(text)
        del manifest["sha256"]
        return json.dumps(sealed(manifest))

    cases = (
        ("", "is not JSON"),
        ("[]", "is not a manifest of k2jax"),
        ('{"format": 2}', "must be an object that carries its own sha256"),
        (whole[:-20], "is not JSON"),
        (whole.replace('"format": 2', '"format": 1'), "format is 1, this k2jax reads format 2"),
        (whole.replace('"documents": 24', '"documents": 23'), "sha256 of its values is"),
        (signed(whole.replace('"documents": 24', '"documents": 23')), r"borders.npy: \(documents, tokens\) are \(24, "),
        (signed(whole.replace('"documents": 24', '"documents": 23', 1)), "documents are not the sum of their parts"),
        (signed(whole.replace('"tokens": 1646', '"tokens": 1645')), "shape is .1646,., the manifest says 1645 tokens"),
        (signed(whole.replace('"documents": 24', '"documents": "24"')), "a count is not an integer"),
    )
    for content, message in cases:
        assert content != whole
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            stream = TokenStore(folder).streams["train"]["text"]
            stream.read(0, 1), stream.documents(0, 1)


def test_every_bit_of_the_manifest(folder):
    """No flip is read as another store: refused, or the same values in another spelling."""
    path = folder / "manifest.json"
    whole, manifest = path.read_bytes(), TokenStore(folder).manifest
    for offset in range(0, len(whole), 7):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1 :])
        try:
            assert TokenStore(folder).manifest == manifest
        except UserError:
            pass


def test_each_shard_is_hashed_once_whatever_the_threads(folder, monkeypatch):
    names, real = [], sha256_of
    store, expected = TokenStore(folder), plain("train", load_tokenizer("byte"))
    monkeypatch.setattr(folder_module, "sha256_of", lambda path: (names.append(path.name), real(path))[1])
    results = [None] * 8

    def read(i):
        results[i] = store.streams["train"]["text"].read(0, len(expected))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(np.array_equal(result, expected) for result in results)
    assert sorted(names) == sorted(["zarr.json", *(str(i) for i in range(-(-len(expected) // SHARD)))])


def test_array_files_are_opened_by_any_number_of_threads(folder):
    """With garbage collected often and callbacks on it, as JAX has them: Python 3.11 counted one thread's depth as another's."""
    files = TokenStore(folder)._files
    name = next(name for name in files.files if name.endswith("borders.npy"))
    before, callback = gc.get_threshold(), lambda *_: time.sleep(0)
    gc.callbacks.append(callback)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len([*pool.map(lambda _: files.npy(name), range(1000))]) == 1000
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)


def test_writer_without_finish_is_no_store(tmp_path):
    (tmp_path / "store").mkdir()
    writer = TokenWriter(tmp_path / "store", load_tokenizer("byte"), shard_tokens=SHARD, chunk_tokens=CHUNK)
    writer.append("train", "a", "a" * 500)
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore(tmp_path / "store")
    with pytest.raises(ValueError, match="shard_tokens = 60: must be a positive multiple of chunk_tokens = 16"):
        TokenWriter(tmp_path / "other", load_tokenizer("byte"), shard_tokens=60, chunk_tokens=16)


def test_a_moved_store_is_the_same(folder, tmp_path):
    digest = TokenStore(folder).digest
    shutil.move(folder, tmp_path / "moved")
    assert TokenStore(tmp_path / "moved").digest == digest
