"""Loss on held-out text, in bits per byte: comparable between tokenizers and with other models."""

import math
from typing import NamedTuple

import jax

from k2jax.data.loader.batches import num_windows
from k2jax.data.loader.corpus import Corpus, writes_alike
from k2jax.errors import UserError
from k2jax.inference.load import LoadedModel
from k2jax.sharding.mesh import single_device_mesh
from k2jax.train.validate import bits_per_byte, make_evaluator


class Perplexity(NamedTuple):
    """Of a held-out split: nats and perplexity per token, bits per byte of its text, how many tokens were scored."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def perplexity(
    loaded: LoadedModel, corpus: Corpus, num_sequences: int | None, length: int | None = None, source: str | None = None
) -> Perplexity:
    """Over the first `num_sequences` windows of the validation split's shuffle, or of one source's; None: over all.

    length: tokens of a window, by default what the model was trained to see. Raises UserError if the store has
    fewer windows or was written by another tokenizer than the model's.
    """
    length = loaded.context_length if length is None else length
    if length < 1:
        raise UserError(f"--length {length}: must be at least 1")
    if source is not None and source not in corpus.streams["validation"]:
        there = ", ".join(corpus.streams["validation"]) or "none"
        raise UserError(f"--source {source}: {corpus.path} has no held-out text of it; there is that of {there}")
    if loaded.tokenizer is not None and not writes_alike(loaded.tokenizer, corpus):
        raise UserError(
            f"{corpus.path}: was written by another tokenizer than that of {loaded.source}; give a store of its own"
        )
    rows, ids = loaded.config.model.vocab_size, corpus.vocab_size
    if ids > rows:
        raise UserError(f"{corpus.path}: has ids up to {ids - 1}, the embedding of {loaded.source} has {rows} rows")
    available = num_windows(corpus, "validation", length, source)
    count = available if num_sequences is None else num_sequences
    if not 0 < count <= available:
        raise UserError(
            f"--sequences {count}: the validation split of {corpus.path} has {available} whole sequences of "
            f"{length} tokens; must be 1 to that"
        )
    changes = {
        "train.eval_sequences": count,
        "train.num_microbatches": 1,
        "data.batch_sequences": math.gcd(count, 16),
        "data.sequence_length": length,
    }
    config, mesh = loaded.config.replace(changes), single_device_mesh()
    with jax.set_mesh(mesh):
        state = jax.device_put(loaded.state, jax.NamedSharding(mesh, jax.P()))
        nats = make_evaluator(config, corpus, mesh, source)(state)
    return Perplexity(nats, math.exp(nats), bits_per_byte(nats, corpus, source), count * length)
