"""One training step: the only place where the model meets the optimizer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from k2jax.config import Config
from k2jax.model.rope import Rope
from k2jax.model.transformer import build_model, declarations
from k2jax.optim.balance import balance
from k2jax.optim.build import muonclip_of
from k2jax.optim.plans import make_plans
from k2jax.optim.schedule import learning_rate_of_step
from k2jax.train.loss import cross_entropy_sum
from k2jax.train.stages import stage_of, stage_rope, stage_value
from k2jax.train.state import TrainState


class Batch(NamedTuple):
    """int32 arrays [M, B, T]: M microbatches of B sequences."""

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


class Metrics(NamedTuple):
    """What one step reports; all of the whole batch."""

    loss: jax.Array  # nats per token, without the balance loss
    balance_loss: jax.Array  # [MoE layers], mean over the sequences, before its weight
    grad_norm: jax.Array  # before clipping
    param_norm: jax.Array  # after the update: not finite where the new state is broken
    learning_rate: jax.Array
    max_logits: jax.Array  # [layers, H]
    expert_load: jax.Array  # [MoE layers, E] rows
    router_bias: jax.Array  # [2]: smallest and largest after the update; no MoE layer, no entries


def make_optimizer(config: Config, mesh: jax.sharding.Mesh) -> optax.GradientTransformationExtraArgs:
    """MuonClip for this model, with Newton-Schulz on whole matrices spread over `mesh`."""
    weights = declarations(config.model)
    plans = make_plans(weights, mesh.shape, config.optim.ns_steps)
    return muonclip_of(config.optim, weights, config.batch_tokens, plans)


class Losses(NamedTuple):
    """What a forward pass says of a batch, or of several together."""

    loss: jax.Array  # nats, summed over tokens or their mean
    balance_loss: jax.Array  # [MoE layers], mean over sequences
    max_logits: jax.Array  # [layers, H]
    expert_load: jax.Array  # [MoE layers, E]


def make_loss(config: Config) -> Callable:
    """loss_fn(params, router_bias, microbatch, rope) -> Losses, with the sum of the loss."""
    dtype = jnp.dtype(config.train.compute_dtype)

    def loss_fn(params, router_bias, batch: Batch, rope: Rope) -> Losses:
        model = build_model(config.model, params, router_bias, dtype, remat=config.train.remat == "layer")
        out = model(batch.inputs, batch.positions, batch.segment_ids, rope)
        return Losses(cross_entropy_sum(out.logits, batch.targets), out.balance_loss, out.max_logits, out.expert_load)

    return loss_fn


def accumulate(
    loss_fn: Callable, balance_alpha: jax.Array, params, router_bias, batch: Batch
) -> tuple[Losses, optax.Params]:
    """Losses over all microbatches, means per token and per sequence, and the gradients (float32) of their sum.

    loss_fn(params, router_bias, microbatch) -> Losses. The balance losses of all layers enter with `balance_alpha`.
    """
    num_microbatches, num_tokens = batch.inputs.shape[0], batch.inputs.size

    def objective(params, microbatch):
        of_all = loss_fn(params, router_bias, microbatch)
        share = of_all._replace(loss=of_all.loss / num_tokens, balance_loss=of_all.balance_loss / num_microbatches)
        return share.loss + balance_alpha * share.balance_loss.sum(), share

    def one(total, microbatch):
        total_losses, total_grads = total
        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(params, microbatch)
        summed = jax.tree.map(jnp.add, total_losses, losses)
        summed = summed._replace(max_logits=jnp.maximum(total_losses.max_logits, losses.max_logits))
        return (summed, jax.tree.map(jnp.add, total_grads, grads)), None

    _, shapes = jax.eval_shape(objective, params, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = zeros._replace(max_logits=jnp.full_like(zeros.max_logits, -jnp.inf)), optax.tree.zeros_like(params)
    return jax.lax.scan(one, start, batch)[0]


def make_train_step(config: Config, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """train_step(state, batch) -> (state, metrics); pure, to be jitted with the state donated."""
    loss_fn = make_loss(config)

    def update(grads, opt_state, params, max_logits):
        updates, opt_state = tx.update(grads, opt_state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), opt_state

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        stage = stage_of(config, state.step)
        alpha, bias_rate = (
            stage_value(v, stage) for v in (config.stages.balance_alpha, config.stages.router_bias_rate)
        )
        at_stage = partial(loss_fn, rope=stage_rope(config, stage))
        losses, grads = accumulate(at_stage, alpha, state.params, state.router_bias, batch)
        # Any optax chain may run here: inside auto_axes XLA lays out arrays, outside they have the declared shardings.
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.params, state.opt_state))
        params, opt_state = jax.sharding.auto_axes(update, out_sharding=specs)(
            grads, state.opt_state, state.params, losses.max_logits
        )
        router_bias = jax.tree.map(lambda b: balance(b, losses.expert_load, bias_rate), state.router_bias)
        lr = learning_rate_of_step(config.optim, state.step, config.batch_tokens)
        bias_range = [jnp.stack([b.min(), b.max()]) for b in jax.tree.leaves(router_bias)]
        metrics = Metrics(
            **losses._asdict(),
            grad_norm=optax.tree.norm(grads),
            param_norm=optax.tree.norm(params),
            learning_rate=lr,
            router_bias=bias_range[0] if bias_range else jnp.zeros(0),
        )
        return TrainState(state.step + 1, params, router_bias, opt_state), metrics

    return train_step
