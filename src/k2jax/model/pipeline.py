"""Pipeline stages: each has its share of the MoE layers, and the microbatches pass from one to the next (GPipe).

All layers of a step run in one `jax.shard_map`, where every array is local: weights are gathered when it begins, once;
their gradients are summed over the microbatches in float32 on each device, and over devices when it ends, once. Between
stay the transfers from stage to stage and the experts' exchange. Embedding, head and loss are outside: for them the
axis `stage` is one more that cuts the batch.

M microbatches, Y those of one stage's own, B sequences, T positions, D hidden, L layers, H heads, E experts
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.model.layer_report import LayerReport
from k2jax.model.remat import rematerialise_stage
from k2jax.sharding.names import AXES, LAYER_AXES
from k2jax.sharding.place import uncut_axes
from k2jax.sharding.rules import in_use_axes, spec


@jax.custom_vjp
def _with_gradient_to(w, master):
    """`w`; its gradient goes to `master`, in whose dtype those of all microbatches are added up."""
    del master
    return w


def _forward(w, master):
    return w, jnp.zeros((), master.dtype)


def _backward(like_master, dw):
    return None, dw.astype(like_master.dtype)


_with_gradient_to.defvjp(_forward, _backward)


def _gathered(weights: nnx.State, kept: str, dtype: jnp.dtype | None = None) -> nnx.State:
    """A device's parts of stacks of weights as layers use them; each device gets its own part of the gradient back.

    kept: the axis that goes on to cut the layers, "stage" where a stage has its own. dtype: of activations; None leaves
    the weights in theirs.
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def gather(variable: nnx.Variable) -> nnx.Variable:
        weight, w = variable.weight, variable[...]
        w = w if dtype is None else w.astype(weight.dtype_in_use(dtype))
        cuts = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in weight.spec(sizes)]
        # First, so that the gradient's sum over these devices is the last: by then it is of the part alone.
        w = jax.lax.pcast(w, tuple(axis for axis in AXES if axis not in sum(cuts, ())), to="varying")
        for dim, (cut, used) in enumerate(zip(cuts, in_use_axes(weight.dims), strict=True)):
            if gathered := tuple(axis for axis in cut if axis not in (*used, kept)):
                w = jax.lax.all_gather(w, gathered, axis=dim, tiled=True)
        return variable.replace(w)

    return jax.tree.map(gather, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _at_rest(weights: nnx.State) -> nnx.State:
    """Weights as they are declared to lie, the router bias too, which is whole on every device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    lay = lambda v: v.replace(jax.sharding.reshard(v[...], v.weight.spec(sizes)))  # noqa: E731
    return jax.tree.map(lay, weights, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _shifted(x: jax.Array, by: int) -> jax.Array:
    """`x` of the stage that is `by` stages before this one, around the ring."""
    num = jax.lax.axis_size("stage")
    return jax.lax.ppermute(x, "stage", [(i, (i + by) % num) for i in range(num)])


def _through_stages(run_stage: Callable, x_YBTD: jax.Array, num_microbatches: int):
    """The microbatches through all stages: outputs where their inputs were, and what the layers here saw of them all.

    run_stage(x [B, T, D], microbatch) -> (y, LayerReport of its layers). At tick t stage s works on microbatch t - s.
    The places of a stage's own microbatches are a stream that brings inputs to the first stage and takes outputs from
    the last: one of them moves a stage down in each tick, and the last stage puts what it has made in its place.
    """
    stage, num_stages, num_own = jax.lax.axis_index("stage"), jax.lax.axis_size("stage"), x_YBTD.shape[0]

    def tick(carry, t):
        x_BTD, stream_YBTD = carry
        first_BTD = jax.lax.dynamic_index_in_dim(stream_YBTD, t % num_own, keepdims=False)
        is_real = (t >= stage) & (t < stage + num_microbatches)
        x_BTD = jnp.where(is_real, jnp.where(stage == 0, first_BTD, x_BTD), 0)
        y_BTD, report = run_stage(x_BTD, jnp.clip(t - stage, 0, num_microbatches - 1))
        left_BTD = jnp.where(stage == num_stages - 1, y_BTD, _shifted(first_BTD, -1))
        stream_YBTD = jax.lax.dynamic_update_index_in_dim(stream_YBTD, left_BTD, t % num_own, 0)
        real = jax.tree.map(lambda r: jnp.where(is_real, r, 0), report)
        real = real._replace(max_logits=jnp.where(is_real, report.max_logits, -jnp.inf))
        return (_shifted(y_BTD, 1), stream_YBTD), real

    ticks = jnp.arange(num_microbatches + num_stages - 1)
    (_, stream_YBTD), reports = jax.lax.scan(tick, (jnp.zeros_like(x_YBTD[0]), x_YBTD), ticks)
    report = jax.tree.map(lambda r: r.sum(0), reports)._replace(max_logits=reports.max_logits.max(0))
    return jnp.roll(stream_YBTD, -((num_stages - 1) % num_own), 0), report


class PipelineOutput(NamedTuple):
    """Activations after the last layer, and the report of each stack: maxima and sums over the microbatches."""

    y_YBTD: jax.Array
    reports: list[LayerReport]


def pipelined(
    dense: nnx.Module | None, moe: nnx.Module, run: Callable, x_YBTD: jax.Array, known: tuple, constants: tuple
) -> PipelineOutput:
    """All layers of a step: the dense ones where the microbatches are, the MoE layers stage by stage.

    run(layers, x [B, T, D], known of the microbatch, constants) -> (y, LayerReport of the stack). known:
    arrays [M, B, T], the same on every stage. Neither they nor constants have a gradient.
    """
    stacks = [(nnx.split(layers), kept) for layers, kept in ((dense, ""), (moe, "stage")) if layers is not None]

    def on_device(x_YBTD, known, constants, *weights):
        num_microbatches = known[0].shape[0]
        known, constants = jax.lax.pcast(known, ("stage",), to="varying"), jax.lax.pcast(constants, AXES, to="varying")

        def runner(index: int) -> Callable:
            (graph, _), kept = stacks[index]
            used = _gathered(jax.lax.stop_gradient(weights[index]), kept, x_YBTD.dtype)
            masters = _gathered(weights[index], kept)  # never read, so never made: they stand for their gradient

            def run_stack(x_BTD, m):
                layers = nnx.merge(graph, jax.tree.map(_with_gradient_to, used, masters))
                here = jax.tree.map(lambda x_MBT: jax.lax.dynamic_index_in_dim(x_MBT, m, keepdims=False), known)
                return run(layers, x_BTD, here, constants)

            return rematerialise_stage(run_stack)

        *before, run_stage = map(runner, range(len(stacks)))
        reports = []
        for run_dense in before:
            own = jax.lax.axis_index("stage") * x_YBTD.shape[0] + jnp.arange(x_YBTD.shape[0])
            x_YBTD, dense_report = jax.lax.map(lambda part, run=run_dense: run(*part), (x_YBTD, own))
            max_LH = jax.lax.stop_gradient(dense_report.max_logits.max(0))
            reports.append(LayerReport(jax.lax.pmax(max_LH, AXES)))
        x_YBTD, report = _through_stages(run_stage, x_YBTD, num_microbatches)
        reports.append(
            LayerReport(
                max_logits=jax.lax.pmax(jax.lax.stop_gradient(report.max_logits), LAYER_AXES),
                expert_load=jax.lax.psum(report.expert_load, uncut_axes("E")),
                rows_dropped=jax.lax.psum(report.rows_dropped, LAYER_AXES),
                balance_loss=jax.lax.pmean(report.balance_loss, LAYER_AXES),
            )
        )
        return PipelineOutput(x_YBTD, reports)

    own_L = spec("Y")
    moe_specs = LayerReport(own_L, spec("YE"), own_L, own_L)
    specs = PipelineOutput(spec("YBTD"), [LayerReport(spec(""))] * (len(stacks) - 1) + [moe_specs])
    weights = [_at_rest(state) for (_, state), _ in stacks]
    return jax.shard_map(on_device, out_specs=specs)(x_YBTD, known, constants, *weights)
