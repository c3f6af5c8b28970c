"""Megatron's files, written here byte by byte from the description of their format."""

import struct

import numpy as np
import pytest

from k2jax.config import Config
from k2jax.data.loader.batches import num_windows, train_batches, validation_batches
from k2jax.data.loader.corpus import open_corpus, open_data
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.store.manifest import CorruptStore
from k2jax.errors import UserError

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8, "uint32": 9, "uint64": 10}
T, B = 10, 4


def write(prefix, sequences, documents, dtype, modes=False, version=1):
    """sequences: lists of ids; documents: number of the first sequence of each, and the end."""
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    lengths = [len(s) for s in sequences]
    places = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<Q", version) + struct.pack("<B", CODES[dtype])
    head += struct.pack("<QQ", len(sequences), len(documents))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(places)}q", *places)
    body += struct.pack(f"<{len(documents)}q", *documents) + bytes(len(lengths) * modes)
    prefix.with_suffix(".idx").write_bytes(head + body)
    return str(prefix.with_suffix(".idx"))


def example(seed=0, count=40):
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(0, 200, n).tolist() for n in draw.integers(1, 30, count)]
    return sequences, [0, 1, 3, 3, 10, *range(11, count + 1)]  # of several sequences, and one of none


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_streams(tmp_path, dtype, modes):
    sequences, documents = example()
    corpus = open_corpus(write(tmp_path / "web", sequences, documents, dtype, modes), index_dir=str(tmp_path / "i"))
    stream = corpus.streams["train"]["web"]
    whole = np.concatenate(sequences)
    assert np.array_equal(stream.read(0, stream.num_tokens), whole) and stream.read(0, 3).dtype == np.uint32
    ends = np.cumsum([0, *map(len, sequences)])[documents]
    assert stream.num_documents == len(documents) - 1
    assert stream.borders(0, stream.num_documents).tolist() == ends.tolist()
    for start in range(0, len(whole) - 25, 7):
        first, starts = stream.documents(start, start + 25)
        naive = [i for i in range(len(ends) - 1) if ends[i] < start + 25 and ends[i + 1] > start]
        assert first == naive[0] and {*starts.tolist()} == {int(ends[i]) for i in naive}
    assert stream.records([4])[0] == {"name": "web#4"} and [*stream.find_name("web#4")] == [4]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint64"])
def test_ids_that_are_none_stay_none(tmp_path, dtype):
    """Cut to 32 bits, 2**32 + 5 would be an id like any other."""
    wrong = [-1, -(2**32) + 7] if dtype == "int64" else [2**63 + 3] if dtype == "uint64" else [-1]
    wrong += [2**32 + 5] if np.dtype(dtype).itemsize == 8 else []
    write(tmp_path / "web", [[3, 5, *wrong]], [0, 1], dtype)
    corpus = open_corpus(str(tmp_path / "web.idx"), index_dir=str(tmp_path / "indexes"))
    found = corpus.streams["train"]["web"].read(0, 2 + len(wrong)).tolist()
    assert found == [3, 5] + [2**32 - 1] * len(wrong)


def config_of(tmp_path, path, **changes):
    values = {"data.path": path, "data.sequence_length": T, "data.batch_sequences": B, "model.vocab_size": 258}
    values |= {"train.eval_sequences": 4, "data.index_dir": str(tmp_path / "indexes")}
    return Config().replace(values | {name.replace("__", "."): value for name, value in changes.items()})


def test_a_run_on_two_files(tmp_path):
    one, two = (write(tmp_path / name, *example(seed), "uint16") for seed, name in enumerate(("web", "code")))
    held_out = write(tmp_path / "held", *example(9), "int32")
    config = config_of(tmp_path, f"{one},{two}", data__validation_path=held_out, mixture__weights=("web=3 code=1",))
    corpus = open_data(config)
    timeline, _ = settle_timeline(corpus, config)
    batch = next(train_batches(corpus, timeline, config, 5))
    place = timeline.locate(timeline.step_rows(5))
    for row, source, window in zip(batch["tokens"], place.source, place.window, strict=True):
        whole = np.concatenate(example(["web", "code"].index(timeline.names[source]))[0])
        assert np.array_equal(row, whole[window * T : window * T + T + 1])
    assert num_windows(corpus, "validation", T) == (len(np.concatenate(example(9)[0])) - 1) // T
    with pytest.raises(UserError, match="give data.tokenizer"):
        corpus.text_bytes("validation")
    known = open_data(config.replace({"data.tokenizer": "byte"}))
    text = "".join(known.tokenizer().decode(ids) for ids in [np.concatenate(example(9)[0])])
    assert known.tokenizer().vocab_size == 258 and text and known.text_bytes("validation") > 0


def test_the_training_text_is_not_held_out_text(tmp_path):
    """By its content, so under another name or path too."""
    path, other = write(tmp_path / "web", *example(), "uint16"), write(tmp_path / "code", *example(1), "uint16")
    copied = write(tmp_path / "copied", *example(), "uint16")
    for held_out in (path, str(tmp_path / "x/../web.idx"), copied):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(
            UserError, match=r"data.validation_path: .*idx: its source .* training text of .*web.idx; give"
        ):
            open_data(config_of(tmp_path, f"{path},{other}", data__validation_path=held_out))
    open_data(config_of(tmp_path, path, data__validation_path=other))


def test_held_out_ids_outside_the_vocabulary_are_named(tmp_path):
    """On the device they would be clamped, and give a loss like any other."""
    path = write(tmp_path / "web", *example(), "uint16")
    held_out = write(tmp_path / "held", [[1, 2, 300, *range(60)]], [0, 1], "uint16")
    config = config_of(tmp_path, path, data__validation_path=held_out)
    corpus = open_data(config)
    settle_timeline(corpus, config)
    with pytest.raises(
        UserError, match="held-out text, source held: .*held.bin, byte 4: id 300 is not below model.voc"
    ):
        list(validation_batches(corpus, config, 6, 2))


def test_every_change_of_the_files_is_named(tmp_path):
    path = write(tmp_path / "web", *example(), "uint16")
    arguments = {"index_dir": str(tmp_path / "indexes")}
    digest = open_corpus(path, **arguments).digest
    assert open_corpus(path, **arguments).digest == digest
    tokens, index = tmp_path / "web.bin", tmp_path / "web.idx"
    content, head = tokens.read_bytes(), index.read_bytes()
    for offset in range(0, len(content), 11):
        tokens.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
        with pytest.raises(CorruptStore, match=r"web.bin: bytes 0 to .*: sha256 is .*, and was"):
            open_corpus(path, **arguments).streams["train"]["web"].read(0, 5)
    tokens.write_bytes(content[:-2])
    with pytest.raises(UserError, match="web.bin: has .* bytes, web.idx says"):
        open_corpus(path, **arguments)
    tokens.write_bytes(content)
    for offset in range(len(head)):
        index.write_bytes(head[:offset] + bytes([head[offset] ^ 1]) + head[offset + 1 :])
        with pytest.raises(UserError, match=r"web.(idx|bin): "):
            open_corpus(path, **arguments)
    index.write_bytes(head)
    assert open_corpus(path, **arguments).digest == digest


def test_what_is_no_index_is_refused(tmp_path):
    path = write(tmp_path / "web", *example(), "uint16", version=2)
    with pytest.raises(UserError, match="has version 2 and type code 8; must be version 1"):
        open_corpus(path)
    (tmp_path / "web.idx").write_bytes(b"TNTIDX\0\0" + bytes(40))
    with pytest.raises(UserError, match="older format TNTIDX"):
        open_corpus(path)
    (tmp_path / "web.bin").unlink()
    with pytest.raises(UserError, match="web.bin: no such file"):
        open_corpus(path)
