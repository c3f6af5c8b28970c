"""Loss on held-out text, in bits per byte: comparable between tokenizers and with other models."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from k2jax.config import Config, UserError
from k2jax.data.batches import num_windows, validation_batches
from k2jax.data.corpus import Corpus
from k2jax.data.tokenizer import Tokenizer
from k2jax.sharding.mesh import single_device_mesh
from k2jax.sharding.rules import spec
from k2jax.train.loaded import Loaded
from k2jax.train.stages import stage_of, stage_rope
from k2jax.train.state import TrainState
from k2jax.train.step import Batch, make_loss, passes


def split_rows(rows: dict[str, np.ndarray], num_microbatches: int, mesh: jax.sharding.Mesh) -> Batch:
    """Rows {"tokens" [B, T + 1], "segment_ids" [B, T], "positions" [B, T]} as a Batch on `mesh`."""
    tokens = rows["tokens"]
    arrays = (tokens[:, :-1], tokens[:, 1:], rows["positions"], rows["segment_ids"])
    sharding = jax.NamedSharding(mesh, spec("MBT"))
    return Batch(
        *(jax.device_put(a.reshape(num_microbatches, -1, a.shape[1]).astype(np.int32), sharding) for a in arrays)
    )


def bits_per_byte(nats_per_token: float, corpus: Corpus, source: str | None = None) -> float:
    """Nats per predicted token as bits per byte of the validation split's text, or of one source's share of it."""
    tokens, text_bytes = corpus.num_tokens("validation", source), corpus.text_bytes("validation", source)
    return nats_per_token / math.log(2) * tokens / text_bytes


def make_evaluator(config: Config, corpus: Corpus, mesh: jax.sharding.Mesh, source: str | None = None) -> Callable:
    """evaluate(state) -> validation loss in nats per token, over the same sequences, of `source` alone, every time."""
    loss_fn = make_loss(config)
    num_stages = mesh.shape["stage"]  # as many microbatches pass through them together
    rows = config.data.batch_sequences // config.train.num_microbatches * num_stages
    rows = math.gcd(rows, config.train.eval_sequences)  # both are multiples of the batch axes, so their gcd is

    @jax.jit
    def loss_sum(params, router_bias, step, batch: Batch):
        rope = stage_rope(config, stage_of(config, step - 1))  # of the last step done
        return loss_fn(params, router_bias, jax.tree.map(lambda x: x[0], passes(batch)), rope).loss

    def evaluate(state: TrainState) -> float:
        total = 0.0
        for batch in validation_batches(corpus, config, config.train.eval_sequences, rows, source):
            total += float(
                jax.device_get(
                    loss_sum(state.params, state.router_bias, state.step, split_rows(batch, num_stages, mesh))
                )
            )
        return total / (config.train.eval_sequences * config.data.sequence_length)

    return evaluate


class Perplexity(NamedTuple):
    """Of a held-out split: nats and perplexity per token, bits per byte of its text, how many tokens were scored."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def writes_alike(tokenizer: Tokenizer, corpus: Corpus, num_documents: int = 32) -> bool:
    """Whether `tokenizer` is the store's, or gives the same ids for its first held-out documents."""
    own = corpus.tokenizer()
    if own is None or tokenizer.digest == own.digest:
        return True
    streams = corpus.streams["validation"].values()
    borders = [(stream, stream.borders(0, min(num_documents, stream.num_documents))) for stream in streams]
    spans = [(stream, *span) for stream, ends in borders for span in itertools.pairwise(ends.tolist())]
    for stream, start, stop in spans[:num_documents]:
        bos, *ids, eos = stream.read(start, stop).tolist()
        if [bos, eos] != [tokenizer.bos, tokenizer.eos] or tokenizer.encode(own.decode(ids)).tolist() != ids:
            return False
    return True


def perplexity(
    loaded: Loaded, corpus: Corpus, num_sequences: int | None, length: int | None = None, source: str | None = None
) -> Perplexity:
    """Over the first `num_sequences` windows of the validation split's shuffle, or of one source's; None: over all.

    length: tokens of a window, by default what the model was trained to see. Raises UserError where the store has
    fewer windows or was written by another tokenizer than the model's.
    """
    length = loaded.window if length is None else length
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
