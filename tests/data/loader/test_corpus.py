"""Stores joined: what a run must not read together."""

import hashlib

import pytest
from token_writer import TokenWriter, split_of

from k2jax.config import Config
from k2jax.data.loader.corpus import open_corpus, open_data
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import UserError

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


def test_a_fraction_that_grows_in_the_middle_of_a_run(tmp_path):
    """Of what --change-mixture allows: text that was trained on must not become held-out text."""
    fractions = {"small": 0.2, "large": 0.6, "other": 0.2}
    small, large, other = (write(tmp_path / name, name, fraction) for name, fraction in fractions.items())
    trained, held_out = names(open_corpus(small), "train"), names(open_corpus(large), "validation")
    assert trained & held_out  # what the refusal is for

    def go_on(config, past=(), step=0):
        values = {"data.sequence_length": 8, "data.batch_sequences": 2, "train.eval_sequences": 1, "train.num_steps": 9}
        config = config.replace(values | {"model.vocab_size": 258})
        return settle_timeline(open_data(config), config, past, step, change=True)[0].segments

    first = go_on(config_of(small))
    with pytest.raises(UserError) as error:
        go_on(config_of(large), first, 3)
    message = (
        f"data.path: validation_fraction grows, {large} has 0.6 and source 'small' of {small} had 0.2: a document that "
        "was trained on in the first 3 steps would be held out from now on; prepare it with at most 0.2, or give "
        "held-out text as data.validation_path"
    )
    assert str(error.value) == message
    go_on(config_of(large), first, 0)  # nothing has been trained on
    plan = go_on(config_of(other), first, 3)
    assert [part["validation_fractions"] for part in plan] == [{"small": 0.2}, {"other": 0.2}]
    unread = config_of(f"{small},{large}", validation_path=other).replace({"mixture.weights": ("large=1",)})
    go_on(config_of(large), go_on(unread), 3)  # `small` was there, but not trained on
    elsewhere = go_on(config_of(large, validation_path=other), first, 3)
    with pytest.raises(UserError) as error:
        go_on(config_of(large), elsewhere, 5)  # its own held-out part, by taking the other away again
    assert str(error.value) == message.replace("3 steps", "5 steps")
    large_first = go_on(config_of(large))
    back = go_on(config_of(small), large_first, 3)  # what was held out is trained on
    with pytest.raises(UserError, match="validation_fraction grows"):
        go_on(config_of(large), back, 5)
