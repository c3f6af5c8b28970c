"""One training step: the only place where the model meets the optimizer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from k2jax.config import Config
from k2jax.model.transformer import build_model, declarations
from k2jax.optim.balance import balance
from k2jax.optim.build import map_weights, muonclip
from k2jax.optim.schedule import learning_rate_of_step
from k2jax.sharding.rules import whole_matrix_specs
from k2jax.train.loss import cross_entropy_sum
from k2jax.train.state import TrainState, Weight


class Batch(NamedTuple):
    """int32 arrays [M, B, T]: M microbatches of B sequences."""

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


class Metrics(NamedTuple):
    """What one step reports; all of the whole batch."""

    loss: jax.Array  # nats per token
    grad_norm: jax.Array  # before clipping
    param_norm: jax.Array  # after the update: not finite where the new state is broken
    learning_rate: jax.Array
    max_logits: jax.Array  # [layers, H]
    expert_load: jax.Array  # [MoE layers, E] rows


def make_optimizer(config: Config, mesh: jax.sharding.Mesh) -> optax.GradientTransformationExtraArgs:
    """MuonClip for this model, with Newton-Schulz on whole matrices spread over `mesh`."""

    def layouts(weight: Weight):
        return whole_matrix_specs(weight.shape[: weight.num_stack], weight.spec, mesh)

    weights = declarations(config.model)
    return muonclip(config.optim, weights, config.batch_tokens, map_weights(layouts, weights))


def make_loss(config: Config) -> Callable:
    """loss_fn(params, router_bias, microbatch) -> (loss sum in nats, (max_logits, expert_load))."""
    dtype = jnp.dtype(config.train.compute_dtype)

    def loss_fn(params, router_bias, batch: Batch):
        model = build_model(config.model, params, router_bias, dtype, remat=config.train.remat == "layer")
        out = model(batch.inputs, batch.positions, batch.segment_ids)
        return cross_entropy_sum(out.logits, batch.targets), (out.max_logits, out.expert_load)

    return loss_fn


def accumulate(loss_fn: Callable, params, router_bias, batch: Batch):
    """Mean loss and its gradients (float32) over all microbatches; maxima and loads over all of them too."""
    num_tokens = batch.inputs.size

    def mean_loss(params, microbatch):
        loss, aux = loss_fn(params, router_bias, microbatch)
        return loss / num_tokens, aux

    def one(total, microbatch):
        (loss, (max_logits, load)), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, microbatch)
        total_loss, total_max, total_load, total_grads = total
        total_grads = jax.tree.map(jnp.add, total_grads, grads)
        return (total_loss + loss, jnp.maximum(total_max, max_logits), total_load + load, total_grads), None

    _, aux = jax.eval_shape(mean_loss, params, jax.tree.map(lambda x: x[0], batch))
    start = (
        jnp.zeros(()),
        jnp.full(aux[0].shape, -jnp.inf, jnp.float32),
        jnp.zeros(aux[1].shape, jnp.int32),
        optax.tree.zeros_like(params),
    )
    return jax.lax.scan(one, start, batch)[0]


def make_train_step(config: Config, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """train_step(state, batch) -> (state, metrics); pure, to be jitted with the state donated."""
    loss_fn = make_loss(config)

    def update(grads, opt_state, params, max_logits):
        updates, opt_state = tx.update(grads, opt_state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), opt_state

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, max_logits, load, grads = accumulate(loss_fn, state.params, state.router_bias, batch)
        # Any optax chain may run here: inside auto_axes XLA lays out arrays, outside they have the declared shardings.
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.params, state.opt_state))
        params, opt_state = jax.sharding.auto_axes(update, out_sharding=specs)(
            grads, state.opt_state, state.params, max_logits
        )
        router_bias = jax.tree.map(lambda b: balance(b, load, config.optim.router_bias_rate), state.router_bias)
        lr = learning_rate_of_step(config.optim, state.step, config.batch_tokens)
        metrics = Metrics(loss, optax.tree.norm(grads), optax.tree.norm(params), lr, max_logits, load)
        return TrainState(state.step + 1, params, router_bias, opt_state), metrics

    return train_step
