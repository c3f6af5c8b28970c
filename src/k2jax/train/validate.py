"""Loss on held-out text, in bits per byte: comparable between tokenizers and with other models."""

import math
from collections.abc import Callable

import jax

from k2jax.config import Config
from k2jax.data.loader.batches import validation_batches
from k2jax.data.loader.corpus import Corpus
from k2jax.train.batch import Batch, BatchLayout, passes
from k2jax.train.compiling import compiled_when_called
from k2jax.train.phases import phase_of, phase_rope
from k2jax.train.state import TrainState
from k2jax.train.step import make_loss


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
    layout = BatchLayout(mesh, num_stages, rows, config.data.sequence_length)

    @jax.jit
    def loss_sum(params, router_bias, step, batch: Batch):
        rope = phase_rope(config, phase_of(config, step - 1))  # of the last step done
        return loss_fn(params, router_bias, jax.tree.map(lambda x: x[0], passes(batch)), rope).loss

    together = compiled_when_called(loss_sum)

    def evaluate(state: TrainState) -> float:
        total = 0.0
        for batch in validation_batches(corpus, config, config.train.eval_sequences, rows, source, layout.places):
            loss = together(state.params, state.router_bias, state.step, layout.split(batch))
            total += float(jax.device_get(loss))
        return total / (config.train.eval_sequences * config.data.sequence_length)

    return evaluate
