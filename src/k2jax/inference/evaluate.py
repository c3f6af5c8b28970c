"""Loss on held-out text, in bits per byte: comparable between tokenizers and with other models."""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from k2jax.data.loader.batches import num_windows, validation_batches
from k2jax.data.loader.corpus import Corpus, writes_alike
from k2jax.errors import UserError
from k2jax.inference.load import LoadedModel
from k2jax.inference.mesh import DATA_AXES, padded_to
from k2jax.model.rope import make_rope
from k2jax.sharding.compile_options import program_options
from k2jax.sharding.rules import AXES_OF
from k2jax.train.batch import Batch, BatchLayout
from k2jax.train.compiling import compiled_when_called
from k2jax.train.phases import rope_after
from k2jax.train.step import make_loss
from k2jax.train.validate import bits_per_byte
from k2jax.words import counted

BATCH_ROWS = 16  # scored together, or as many as the data axes have shards


class Perplexity(NamedTuple):
    """Of a held-out split: nats and perplexity per token, bits per byte of its text, how many tokens were scored."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int


def _padded(rows: dict[str, np.ndarray] | None, num_rows: int, length: int) -> Batch:
    """int32 [num_rows, T] of up to as many rows {"tokens" [n, T + 1], ...}, None: none.

    Added rows have target -1, which has no loss.
    """
    inputs, targets, positions, segment_ids = np.zeros((4, num_rows, length), np.int32)
    targets[:] = -1
    if rows is not None:
        count, tokens = len(rows["tokens"]), rows["tokens"]
        inputs[:count], targets[:count] = tokens[:, :-1], tokens[:, 1:]
        positions[:count], segment_ids[:count] = rows["positions"], rows["segment_ids"]
    return Batch(inputs, targets, positions, segment_ids)


def _mean_loss(loaded: LoadedModel, corpus: Corpus, count: int, length: int, source: str | None) -> float:
    """Nats per token over the first `count` windows of `length` tokens of the validation split, or of one source's."""
    config, state = loaded.config.replace({"data.sequence_length": length}), loaded.state
    # The phase follows from the run's own tokens per step: not from `config`, whose sequences are of another length.
    rope, loss_fn = make_rope(config.model, rope_after(loaded.config, int(state.step))), make_loss(config)
    num_rows = padded_to(loaded.mesh, DATA_AXES, min(count, BATCH_ROWS))
    layout = None if loaded.mesh is None else BatchLayout(loaded.mesh, 1, num_rows, length)
    places = np.arange(num_rows) if layout is None else layout.places  # rows of each batch that this process needs
    on_devices = (lambda x: x[None]) if layout is None else layout.on_mesh

    @partial(jax.jit, compiler_options=program_options(config.kernels, loaded.mesh))
    def loss_sum(params, router_bias, batch: Batch):
        return loss_fn(params, router_bias, jax.tree.map(lambda x: x[0], batch), rope).loss

    together, total = compiled_when_called(loss_sum), 0.0
    batches = validation_batches(corpus, config, count, num_rows, source, places)
    with loaded.on_mesh():
        for _ in range(0, count, num_rows):  # the last may have no row for this process, whose devices are needed
            batch = Batch(*map(on_devices, _padded(next(batches, None), len(places), length)))
            total += float(jax.device_get(together(state.params, state.router_bias, batch)))
    return total / (count * length)


def perplexity(
    loaded: LoadedModel, corpus: Corpus, num_sequences: int | None, length: int | None = None, source: str | None = None
) -> Perplexity:
    """Over the first `num_sequences` windows of the validation split's shuffle, or of one source's; None: over all.

    length: tokens of a window, by default what the model was trained to see. The last batch is filled up with
    rows that are not counted: the number of sequences is free, but on a mesh `length` must be a multiple of
    context * tensor. Raises UserError if it is not, the store has fewer windows or was written by another tokenizer
    than the model's.
    """
    length = loaded.context_length if length is None else length
    if length < 1:
        raise UserError(f"--length {length}: must be at least 1")
    if (above := padded_to(loaded.mesh, AXES_OF["T"], length)) != length:
        divisor = padded_to(loaded.mesh, AXES_OF["T"], 1)
        near = " or ".join(str(n) for n in (above - divisor, above) if n)
        rule = f"must be a multiple of mesh.context * mesh.tensor = {divisor}; nearest: {near}"
        raise UserError(f"--length {length}: {rule}")
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
            f"--sequences {count}: the validation split of {corpus.path} has {counted(available, 'whole sequence')} of "
            f"{counted(length, 'token')}; must be 1 to that"
        )
    nats = _mean_loss(loaded, corpus, count, length, source)
    return Perplexity(nats, math.exp(nats), bits_per_byte(nats, corpus, source), count * length)
