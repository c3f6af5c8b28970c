"""One training step: the only place where the model meets the optimizer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from k2jax.config import Config
from k2jax.model.layer_report import LayerReport
from k2jax.model.rope import Rope
from k2jax.model.router_bias import update_router_bias
from k2jax.model.transformer import build_model, declarations
from k2jax.optim.rounding import lost_updates
from k2jax.optim.schedule import learning_rate_of_step
from k2jax.optim.setup import map_weights
from k2jax.train.batch import Batch, passes
from k2jax.train.guard import after_step, is_good, zscores
from k2jax.train.optimizer import call_update
from k2jax.train.phases import phase_of, phase_rope, phase_value
from k2jax.train.state import TrainState

OPTIMIZER_SCOPE = "optimizer"  # in the name of every operation of the update: what a compiled step says of itself


class Metrics(NamedTuple):
    """Metrics of one step over the whole batch."""

    loss: jax.Array  # nats per token, without the balance loss
    report: LayerReport  # its balance loss before the weight of the phase
    grad_norm: jax.Array  # before clipping
    param_norm: jax.Array  # after the update: not finite if the new state is broken
    learning_rate: jax.Array
    router_bias: jax.Array  # [2]: smallest and largest after the update; no MoE layer, no entries
    lost_updates: dict[str, dict[str, jax.Array]]  # {dtype: {group: share}}, of a skipped step without meaning
    skipped: jax.Array  # bad steps so far
    skipped_in_a_row: jax.Array  # 0: this step was good
    zscores: jax.Array  # [2]: of loss and gradient norm, against the good steps before


class Losses(NamedTuple):
    """Loss and report of one forward pass, over one microbatch or several together."""

    loss: jax.Array  # nats, summed over tokens or their mean
    report: LayerReport


def make_loss(config: Config) -> Callable:
    """loss_fn(params, router_bias, one of `passes`, rope) -> Losses, sums over tokens and microbatches."""
    dtype = jnp.dtype(config.train.compute_dtype)

    def loss_fn(params, router_bias, batch: Batch, rope: Rope) -> Losses:
        model = build_model(config.model, params, router_bias, dtype, config.train.remat, kernels=config.kernels)
        run = model if batch.inputs.ndim == 2 else model.losses
        out = run(batch.inputs, batch.positions, batch.segment_ids, rope, batch.targets)
        return Losses(out.loss, out.report)

    return loss_fn


def accumulate(
    loss_fn: Callable, balance_alpha: jax.Array, params, router_bias, batch: Batch, together: int | None = None
) -> tuple[Losses, optax.Params]:
    """Losses over all microbatches, means per token and per sequence, and the gradients (float32) of their sum.

    loss_fn(params, router_bias, one of `passes(batch, together)`) -> Losses. The balance losses of all layers enter
    with `balance_alpha`.
    """
    num_microbatches, num_tokens = batch.inputs.shape[0], batch.inputs.size

    def objective(params, microbatch):
        loss, report = loss_fn(params, router_bias, microbatch)
        loss, balance_loss = loss / num_tokens, report.balance_loss / num_microbatches
        return loss + balance_alpha * balance_loss.sum(), Losses(loss, report._replace(balance_loss=balance_loss))

    def one(total, microbatch):
        total_losses, total_grads = total
        # Or XLA gathers the embedding and the head before the first microbatch, and keeps them for all.
        now, microbatch = jax.lax.optimization_barrier((params, microbatch))
        (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(now, microbatch)
        summed = jax.tree.map(jnp.add, total_losses, losses)
        max_logits = jnp.maximum(total_losses.report.max_logits, losses.report.max_logits)
        summed = summed._replace(report=summed.report._replace(max_logits=max_logits))
        return (summed, jax.tree.map(jnp.add, total_grads, grads)), None

    batch = passes(batch, together)
    _, shapes = jax.eval_shape(objective, params, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    lowest = jnp.full_like(zeros.report.max_logits, -jnp.inf)
    start = zeros._replace(report=zeros.report._replace(max_logits=lowest))
    return jax.lax.scan(one, (start, optax.tree.zeros_like(params)), batch)[0]


def make_update(tx: optax.GradientTransformation, labels: optax.Params) -> Callable:
    """update(good, losses, grads, opt_state, params) -> ((params, opt_state), lost_updates).

    Of a step that is not good both are as they were, bit for bit.
    Any optax chain may run here: inside auto_axes XLA lays out arrays, outside they have the declared shardings.
    """

    def update(good, losses: Losses, grads, opt_state, params):
        updates, new_state = call_update(
            tx, grads, opt_state, params, value=losses.loss, grad=grads, max_logits=losses.report.max_logits
        )
        lost = {str(jnp.dtype(d)): lost_updates(params, updates, labels, d) for d in (jnp.float32, jnp.bfloat16)}
        new = optax.apply_updates(params, updates), new_state
        return jax.tree.map(partial(jnp.where, good), new, (params, opt_state)), lost

    @jax.named_scope(OPTIMIZER_SCOPE)
    def on_mesh(good, losses: Losses, grads, opt_state, params):
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, opt_state))
        run = jax.sharding.auto_axes(update, out_sharding=(specs, jax.P()))
        return run(good, losses, grads, opt_state, params)

    return on_mesh


def make_train_step(config: Config, tx: optax.GradientTransformation) -> Callable:
    """train_step(state, batch) -> (state, metrics); pure, to be jitted with the state donated.

    A bad step (config.GuardConfig) leaves all but the step's number and the guard as it was.
    """
    loss_fn = make_loss(config)
    update = make_update(tx, map_weights(lambda w: w.group, declarations(config.model)))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        phase = phase_of(config, state.step)
        alpha, bias_rate = (
            phase_value(v, phase) for v in (config.phases.balance_alpha, config.phases.router_bias_rate)
        )
        in_phase = partial(loss_fn, rope=phase_rope(config, phase))
        together = config.train.microbatches_together
        losses, grads = accumulate(in_phase, alpha, state.params, state.router_bias, batch, together)
        grad_norm = optax.tree.norm(grads)
        scores = zscores(state.guard, losses.loss, grad_norm)
        good = is_good(config.guard, scores, losses.loss, grad_norm, losses.report.max_logits)
        (params, opt_state), lost = update(good, losses, grads, state.opt_state, state.params)
        router_bias = jax.tree.map(
            lambda b: jnp.where(good, update_router_bias(b, losses.report.expert_load, bias_rate), b), state.router_bias
        )
        guard = after_step(state.guard, good, losses.loss, grad_norm)
        bias_range = [jnp.stack([b.min(), b.max()]) for b in jax.tree.leaves(router_bias)]
        metrics = Metrics(
            *losses,
            grad_norm=grad_norm,
            param_norm=optax.tree.norm(params),
            learning_rate=learning_rate_of_step(config.optim, state.step - state.guard.skipped, config.batch_tokens),
            router_bias=bias_range[0] if bias_range else jnp.zeros(0),
            lost_updates=lost,
            skipped=guard.skipped,
            skipped_in_a_row=guard.in_a_row,
            zscores=scores,
        )
        return TrainState(state.step + 1, params, router_bias, opt_state, guard), metrics

    return train_step
