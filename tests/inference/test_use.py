"""Generation and perplexity of a model, against loops over the plain forward pass."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.cli.main import main
from k2jax.data.loader.batches import validation_batches
from k2jax.data.loader.corpus import open_corpus
from k2jax.data.text.prepare import prepare
from k2jax.errors import UserError
from k2jax.inference import load
from k2jax.inference.evaluate import perplexity
from k2jax.inference.generate import continue_tokens, generate
from k2jax.model.rope import make_rope
from k2jax.model.transformer import build_model
from k2jax.train.start import check_source

WINDOW = 16  # of the model of conftest.py


@pytest.fixture(scope="module")
def logits_of(loaded):
    """logits_of(tokens): of the last of them, by the plain forward pass."""
    state, model = loaded.state, loaded.config.model
    apply = jax.jit(lambda t: build_model(model, state.params, state.router_bias, jnp.dtype("float32"))(t).logits)

    def logits(tokens):
        padded = np.zeros((1, WINDOW), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(padded))[0, len(tokens) - 1]

    return logits


def greedy_by_hand(logits_of, context, count):
    """Each next token from the whole context; a full window goes on with its newer half."""
    context, found = list(context)[-WINDOW:], []
    for _ in range(count):
        if len(context) > WINDOW:
            context = context[-(WINDOW // 2) :]
        found.append(int(np.argmax(logits_of(context))))
        context.append(found[-1])
    return found


def test_greedy_past_the_window(loaded, logits_of):
    for context in ([256], list(b"def f(x):"), list(range(97, 97 + WINDOW)), list(range(60, 100))):
        assert continue_tokens(loaded, [context], 40, 0.0, 0, ())[0] == greedy_by_hand(logits_of, context, 40)


def test_batch_of_unequal_prompts(loaded):
    """As one by one, until the longest fills the window for all."""
    contexts = [[256], list(b"abcdefgh"), list(b"xyz")]
    together = continue_tokens(loaded, contexts, 9, 0.0, 0, ())
    assert together == [continue_tokens(loaded, [context], 9, 0.0, 0, ())[0] for context in contexts]


def test_sampling_follows_seed_and_temperature(loaded, logits_of):
    one, again, other = (continue_tokens(loaded, [[256, 100]], 12, 1.0, seed, ())[0] for seed in (0, 0, 1))
    assert one == again != other
    cold = continue_tokens(loaded, [[256, 100]], 12, 1e-4, 3, ())[0]
    assert cold == continue_tokens(loaded, [[256, 100]], 12, 0.0, 0, ())[0]
    rows = continue_tokens(loaded, [[256, 100]] * 400, 1, 2.0, 5, ())
    counts = np.bincount([row[0] for row in rows], minlength=258) / 400
    exact = np.exp(logits_of([256, 100]) / 2.0)
    exact /= exact.sum()
    assert 0.5 * np.abs(counts - exact).sum() < 0.5 * np.sqrt(258 / 400)  # total variation of 400 draws


def test_stop_token_ends_a_row_alone(loaded):
    contexts = [[256], list(b"abcdefgh")]
    free = continue_tokens(loaded, contexts, 9, 0.0, 0, ())
    stop = free[0][3]
    stopped = continue_tokens(loaded, contexts, 9, 0.0, 0, {stop})
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_perplexity_by_hand(place, loaded):
    """Window by window in float64 from the plain forward pass."""
    store, state = open_corpus(str(place / "store")), loaded.state
    found = perplexity(loaded, store, 24)
    total = 0.0
    for batch in validation_batches(store, loaded.config, 24, 8):
        model = build_model(loaded.config.model, state.params, state.router_bias, jnp.dtype("float32"))
        out = jax.jit(lambda t, p, s, m=model: m(t, p, s, make_rope(m.config, "plain")).logits)(
            batch["tokens"][:, :-1], batch["positions"], batch["segment_ids"]
        )
        logits = np.asarray(out, np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(logs, batch["tokens"][:, 1:, None], -1).sum()
    assert found.tokens == 24 * WINDOW
    assert found.nats_per_token == pytest.approx(total / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(total / found.tokens), rel=1e-5)


def test_perplexity_of_other_lengths(place, loaded):
    """A longer window sees more; the same tokens are counted."""
    store = open_corpus(str(place / "store"))
    one, other = (perplexity(loaded, store, count, length) for count, length in ((4, 16), (8, 8)))
    assert (one.tokens, other.tokens) == (64, 64) and one.nats_per_token != other.nats_per_token
    with pytest.raises(UserError, match="--length 0"):
        perplexity(loaded, store, 4, 0)


def test_ids_beyond_the_embedding_are_refused(loaded):
    small = dataclasses.replace(loaded.config, model=dataclasses.replace(loaded.config.model, vocab_size=200))
    with pytest.raises(UserError, match="gives the id 256, its embedding has 200 rows"):
        generate(dataclasses.replace(loaded, config=small), ["a"], 1, 0.0, 0)


def test_perplexity_refuses(place, loaded, tmp_path):
    store = open_corpus(str(place / "store"))
    with pytest.raises(UserError, match="--sequences 1000000: the validation split"):
        perplexity(loaded, store, 10**6)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"some text {i} " * 50)
    prepare(str(tmp_path / "text"), str(tmp_path / "other"), "train:300", validation_fraction=0.5)
    other = open_corpus(str(tmp_path / "other"))
    with pytest.raises(UserError, match="written by another tokenizer"):
        perplexity(loaded, other, None)
    with pytest.raises(UserError, match="has ids up to 2.., the embedding of .* has 258 rows"):
        perplexity(dataclasses.replace(loaded, tokenizer=None), other, None)
    with pytest.raises(UserError, match="another tokenizer than that of"):
        model = dataclasses.replace(loaded.config.model)
        train = dataclasses.replace(loaded.config.train, init_from=loaded.source, run_dir=str(tmp_path / "new"))
        check_source(dataclasses.replace(loaded.config, model=model, train=train), other)


def test_options_that_do_not_go_together(place, capsys):
    assert main(["eval", str(place / "run"), "--limit", "0", "--task-folder", "x"]) == 2
    error = capsys.readouterr().err
    assert "--task-folder: goes with --tasks alone" in error and "--limit 0: must be at least 1" in error
    assert main(["eval", str(place / "run"), "--tasks", "a", "--sequences", "3"]) == 2
    assert "--sequences: does not go with --tasks" in capsys.readouterr().err


def test_exported_model_is_used_like_the_run(place, capsys, tmp_path):
    """The same text and the same perplexity from the folder that other libraries read, on the run's own store."""
    run, out, store = str(place / "run"), str(tmp_path / "hf"), str(place / "store")
    assert main(["export", run, "--to", out, "--dtype", "f32"]) == 0
    assert "step 0" in capsys.readouterr().out
    texts, figures = [], []
    for source in (run, out):
        assert main(["generate", source, "def f(", "class", "--tokens", "8", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["eval", source, "--data", store, "--sequences", "16", "--json"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and texts[0].startswith("def f(") and "\n---\nclass" in texts[0]
    assert figures[0] == figures[1] and figures[0]["tokens"] == 16 * WINDOW


def test_a_published_folder_has_no_steps(place, capsys, tmp_path):
    assert main(["export", str(place / "run"), "--to", str(tmp_path / "hf")]) == 0
    assert main(["generate", str(tmp_path / "hf"), "--step", "3"]) == 2
    assert "--step 3" in capsys.readouterr().err


def test_processes_take_the_step_that_the_first_finds(place, monkeypatch):
    """The run may still save, and each would see another newest step."""
    monkeypatch.setattr(load, "on_first", lambda name, function: 0)
    monkeypatch.setattr(load, "sound_step", lambda *_: pytest.fail("looked for itself"))
    assert load.load_run(place / "run").state.step == 0
