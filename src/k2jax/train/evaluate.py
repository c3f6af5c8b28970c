"""Loss on held-out text, in bits per byte: comparable between tokenizers and with other models."""

import math
from collections.abc import Callable

import jax
import numpy as np

from k2jax.config import Config
from k2jax.data.batches import validation_batches
from k2jax.data.tokens import TokenStore
from k2jax.sharding.rules import spec
from k2jax.train.stages import stage_of, stage_rope
from k2jax.train.state import TrainState
from k2jax.train.step import Batch, make_loss


def split_rows(rows: dict[str, np.ndarray], num_microbatches: int, mesh: jax.sharding.Mesh) -> Batch:
    """Rows {"tokens" [B, T + 1], "segment_ids" [B, T], "positions" [B, T]} as a Batch on `mesh`."""
    tokens = rows["tokens"]
    arrays = (tokens[:, :-1], tokens[:, 1:], rows["positions"], rows["segment_ids"])
    sharding = jax.NamedSharding(mesh, spec("MBT"))
    return Batch(
        *(jax.device_put(a.reshape(num_microbatches, -1, a.shape[1]).astype(np.int32), sharding) for a in arrays)
    )


def bits_per_byte(nats_per_token: float, store: TokenStore) -> float:
    """Nats per predicted token as bits per byte of the validation split's text."""
    return nats_per_token / math.log(2) * store.num_tokens("validation") / store.text_bytes("validation")


def make_evaluator(config: Config, store: TokenStore, mesh: jax.sharding.Mesh) -> Callable:
    """evaluate(state) -> validation loss in nats per token, over the same sequences every time."""
    loss_fn = make_loss(config)
    rows = config.data.batch_sequences // config.train.num_microbatches
    rows = math.gcd(rows, config.train.eval_sequences)  # both are multiples of the batch axes, so their gcd is

    @jax.jit
    def loss_sum(params, router_bias, step, batch: Batch):
        rope = stage_rope(config, stage_of(config, step - 1))  # of the last step done
        return loss_fn(params, router_bias, jax.tree.map(lambda x: x[0], batch), rope).loss

    def evaluate(state: TrainState) -> float:
        total = 0.0
        for batch in validation_batches(store, config.data, config.train.eval_sequences, rows):
            total += float(
                jax.device_get(loss_sum(state.params, state.router_bias, state.step, split_rows(batch, 1, mesh)))
            )
        return total / (config.train.eval_sequences * config.data.sequence_length)

    return evaluate
