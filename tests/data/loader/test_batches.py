"""Batches against slices of the whole token stream, and the contract of a resume."""

import itertools
import json

import numpy as np
import pytest
from token_writer import TokenWriter

from k2jax.config import Config
from k2jax.data.loader.batches import (
    NUM_ROWS,
    check_position,
    data_position,
    num_windows,
    train_batches,
    validation_batches,
)  # fmt: skip
from k2jax.data.loader.corpus import open_corpus
from k2jax.data.loader.rows import BadRow, make_rows, read_pieces
from k2jax.data.loader.segments import settle_timeline
from k2jax.data.loader.shuffle import permute
from k2jax.data.loader.timeline import permutation_key
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import UserError

T, B = 12, 4
BOS = 256


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_corpus(str(write(tmp_path_factory.mktemp("batches") / "store")))


def write(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer = TokenWriter(folder, load_tokenizer("byte"), shard_tokens=64, chunk_tokens=16)
    for split, count in (("train", 25), ("validation", 8)):
        for i in range(count):
            writer.append(split, str(i), "".join(map(chr, rng.integers(97, 123, rng.integers(1, 40)))))
    writer.finish()
    return folder


def train(corpus, start, **changes):
    settings = config(**{f"data.{name}": value for name, value in changes.items()})
    return train_batches(corpus, settle_timeline(corpus, settings)[0], settings, start)


def stream_of(corpus, split):
    stream = corpus.streams[split]["text"]
    return stream.read(0, stream.num_tokens).tolist()


def config(**changes):
    values = {"data.sequence_length": T, "data.batch_sequences": B, "data.seed": 5}
    values |= {"model.vocab_size": 258, "train.eval_sequences": 4}
    return Config().replace(values | changes)


def naive_row(stream, window):
    """One token at a time, from the bos tokens in the stream."""
    tokens = stream[window * T : window * T + T + 1]
    segment, position, segments, positions = 0, -1, [], []
    for i, token in enumerate(tokens[:-1]):
        new = token == BOS and i > 0
        segment, position = segment + new, 0 if token == BOS else position + 1
        segments.append(segment), positions.append(position)
    return tokens, segments, positions


def naive_batch(stream, step, seed):
    count = (len(stream) - 1) // T
    rows = []
    for row in range(step * B, step * B + B):
        epoch = row // count
        rows.append(
            naive_row(stream, permute(np.arange(count), count, permutation_key(seed, epoch, "train/text"))[row % count])
        )
    return dict(zip(("tokens", "segment_ids", "positions"), map(np.array, zip(*rows))))


def assert_same(found, expected):
    assert found.keys() == expected.keys() == {"tokens", "segment_ids", "positions"}
    for name in expected:
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_rows_of_every_window(store):
    for split in ("train", "validation"):
        stream = stream_of(store, split)
        assert num_windows(store, split, T) == (len(stream) - 1) // T > 5
        for window in range(num_windows(store, split, T)):
            piece = (store.streams[split]["text"], window * T, window * T + T + 1)
            for found, expected in zip(make_rows(*read_pieces([piece]), T), naive_row(stream, window), strict=True):
                assert found.tolist() == [list(expected)]


def test_batches_match_slices_over_three_epochs(store):
    stream = stream_of(store, "train")
    steps = 3 * num_windows(store, "train", T) // B + 2
    for step, batch in enumerate(take(train(store, 0), steps)):
        assert batch["tokens"].shape == (B, T + 1) and batch["positions"].shape == batch["segment_ids"].shape == (B, T)
        assert_same(batch, naive_batch(stream, step, 5))


def test_an_epoch_has_every_window_once(store):
    timeline, _ = settle_timeline(store, config(**{"data.seed": 1}))
    count = num_windows(store, "train", T)
    source, epochs, windows = timeline.locate(np.arange(3 * count))
    assert not source.any()
    for epoch in range(3):
        assert sorted(windows[epochs == epoch]) == list(range(count))
    assert not np.array_equal(windows[:count], windows[count : 2 * count])


def test_order_is_golden():
    """If this fails, runs in progress would see other data after a resume: mend the code, never these numbers."""
    rows = [0, 1, 2, 999, 1000, 2**40]
    windows = [permute(row % 1000, 1000, permutation_key(3, row // 1000)) for row in rows]
    assert windows == [72, 893, 297, 309, 3, 244]
    assert permutation_key(0, 0, "validation") == 15690436942914775927


def test_resume_at_every_step_is_the_tail(store):
    whole = take(train(store, 0), 12)
    for start in range(12):
        tail = take(train(store, start), 12 - start)
        [assert_same(found, expected) for found, expected in zip(tail, whole[start:], strict=True)]


def test_threads_and_prefetch_change_nothing(store):
    expected = take(train(store, 3, read_threads=0), 20)
    for threads, prefetch in ((1, 1), (4, 1), (8, 64), (2, 3)):
        found = take(train(store, 3, read_threads=threads, prefetch_sequences=prefetch), 20)
        [assert_same(a, b) for a, b in zip(found, expected, strict=True)]


def test_seeds_differ(store):
    a, b = (next(train(store, 0, seed=seed))["tokens"] for seed in (5, 6))
    assert not np.array_equal(a, b)


def test_far_steps(store):
    stream = stream_of(store, "train")
    for step in (2**40 // B, NUM_ROWS // B - 1):
        assert_same(next(train(store, step)), naive_batch(stream, step, 5))


def test_damage_reaches_the_loop_by_name(tmp_path):
    folder = write(tmp_path / "store")
    content = bytearray((folder / "train/text/00000/tokens/c/0").read_bytes())
    content[3] ^= 1
    (folder / "train/text/00000/tokens/c/0").write_bytes(content)
    for threads in (0, 4):
        with pytest.raises(BadRow, match="train/text/00000/tokens/c/0: sha256 is"):
            take(train(open_corpus(str(folder)), 0, read_threads=threads), 30)


def test_validation_is_fixed(store):
    stream = stream_of(store, "validation")
    count = (len(stream) - 1) // T
    order = permute(np.arange(count), count, permutation_key(0, 0, "validation"))
    for seed in (5, 6):
        batches = list(validation_batches(store, config(**{"data.seed": seed}), 7, 3))
        assert [len(batch["tokens"]) for batch in batches] == [3, 3, 1]
        expected = [np.array(field) for field in zip(*(naive_row(stream, window) for window in order[:7]))]
        for name, field in zip(("tokens", "segment_ids", "positions"), expected, strict=True):
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), field)
    assert sum(len(batch["tokens"]) for batch in validation_batches(store, config(), count, 4)) == count
    with pytest.raises(UserError) as error:
        validation_batches(store, config(), count + 1, 4)
    assert str(error.value) == (
        f"num_sequences = {count + 1}: must be at most the {count} whole sequences of the validation split; "
        f"nearest: {count}; or lower data.sequence_length, or prepare with a larger --validation-fraction"
    )


def test_held_out_rows_are_dealt_out_where_the_last_batch_is_short(store):
    """Two processes of a batch of four, ten rows: the second has none in the last batch."""
    whole = [batch["tokens"] for batch in validation_batches(store, config(), 10, 4)]
    first, second = ([b["tokens"] for b in validation_batches(store, config(), 10, 4, None, np.array(places))]
                     for places in ([0, 1], [2, 3]))  # fmt: skip
    assert [len(rows) for rows in first] == [2, 2, 2] and [len(rows) for rows in second] == [2, 2]
    for rows, part, other in zip(whole, first, [*second, whole[0][:0]], strict=True):
        np.testing.assert_array_equal(rows, np.concatenate([part, other]))


def test_plan_run_names_everything(store):
    settle_timeline(store, config())
    tokens = store.num_tokens("train")
    longest = store.num_tokens("validation") - 1
    settle_timeline(store, config(**{"data.sequence_length": longest, "train.eval_sequences": 1}))
    with pytest.raises(UserError) as error:
        settle_timeline(store, config(**{"model.vocab_size": 257, "data.sequence_length": tokens}))
    assert error.value.problems == (
        f"model.vocab_size = 257: must be at least 258, the ids of the tokenizer of data.path = '{store.path}'",
        f"data.sequence_length = {tokens}: must be below the {tokens} tokens of the training split of data.path = "
        f"'{store.path}'; at most {tokens - 1} fits",
        "train.eval_sequences = 4: must be at most the 0 whole sequences of the validation split; "
        "lower data.sequence_length, or prepare with a larger --validation-fraction",
    )


def test_position_survives_json_and_names_every_change(store):
    timeline, _ = settle_timeline(store, config())
    saved = json.loads(json.dumps(data_position(timeline, config(), 7)))
    assert saved["next_row"] == 7 * B and saved["manifest"] == store.digest
    check_position(saved, timeline, config(), 7)
    settings = config(**{"data.read_threads": 9})
    check_position(saved, settle_timeline(store, settings)[0], settings, 7)
    other = config(**{"data.seed": 6, "data.batch_sequences": 2, "data.sequence_length": 6})
    changed, _ = settle_timeline(store, other)
    with pytest.raises(UserError) as error:
        check_position({**saved, "manifest": "beef", "new": 1}, changed, other, 7)
    assert error.value.problems == (
        f"data position: manifest is 'beef' in the checkpoint and {store.digest!r} now; "
        "the tokens are not those that the run began with: set data.path to its store, or begin a new run",
        f"data position: timeline is {timeline.digest(7)!r} in the checkpoint and {changed.digest(7)!r} now; "
        "the mixture of steps already done is another: restore the run's timeline.json, or begin a new run",
        "data position: seed is 5 in the checkpoint and 6 now; set data.seed to the run's, or begin a new run",
        "data position: sequence_length is 12 in the checkpoint and 6 now; "
        "set data.sequence_length to the run's, or begin a new run",
        "data position: batch_sequences is 4 in the checkpoint and 2 now; "
        "set data.batch_sequences to the run's, or begin a new run",
        "data position: next_row is 28 in the checkpoint and 14 now; "
        "the checkpoint is of another step than its name says: restore another checkpoint",
        "data position: new is 1 in the checkpoint and None now; "
        "this k2jax does not know it: resume with the one that saved it",
    )
