"""Stores joined: what a run must not read together."""

import hashlib

import pytest

from k2jax.config import Config, UserError
from k2jax.data.corpus import open_corpus, open_data
from k2jax.data.store_writer import TokenWriter, split_of
from k2jax.data.tokenizer import load_tokenizer

TEXTS = [f"text {i}" for i in range(60)]


def write(folder, source, fraction):
    writer = TokenWriter(folder, load_tokenizer("byte"), source=source)
    for text in TEXTS:
        writer.append(split_of(hashlib.sha256(text.encode()).hexdigest(), fraction), text, text)
    writer.finish(validation_fraction=fraction)
    return str(folder)


def names(corpus, split):
    streams = corpus.streams[split].values()
    return {record["name"] for stream in streams for record in stream.records(range(stream.num_documents))}


def config_of(*paths, **data):
    return Config().replace({"data.path": ",".join(paths), **{f"data.{key}": value for key, value in data.items()}})


def test_fractions_between_which_a_document_would_be_on_both_sides(tmp_path):
    one, two, three = (write(tmp_path / name, name, f) for name, f in (("one", 0.2), ("two", 0.6), ("three", 0.2)))
    joined = open_corpus(f"{one},{two}")
    assert names(joined, "train") & names(joined, "validation")  # what the refusal is for
    with pytest.raises(UserError) as error:
        open_data(config_of(one, two, three))
    assert str(error.value) == (
        f"data.path: validation_fraction differs, {one} has 0.2 and {two} has 0.6 and {three} has 0.2: a document of two "
        "would be trained on in one and held out in the other; prepare them with one validation_fraction, or give "
        "held-out text as data.validation_path"
    )
    same = open_data(config_of(one, three))
    assert not names(same, "train") & names(same, "validation")
    open_data(config_of(one, two, validation_path=three))  # their own held-out parts are not read
