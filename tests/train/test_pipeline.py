"""Pipeline stages: the same step as on one device, weights moved once, gradients of all microbatches in float32."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_remat import equations
from test_step import assert_same_step, make_config, one_step

from k2jax.model.layer_report import LayerReport
from k2jax.model.pipeline import pipelined
from k2jax.model.rope import make_rope
from k2jax.model.transformer import build_model, declarations, init_router_bias
from k2jax.model.weights import Stack, Weight
from k2jax.plan.collectives import collectives
from k2jax.runs.folder import write_config
from k2jax.sharding.place import place
from k2jax.train.compile_step import abstract_batch
from k2jax.train.optimizer import make_optimizer
from k2jax.train.start import check_run_dir
from k2jax.train.state import abstract_state
from k2jax.train.step import accumulate, make_loss

# Mesh, microbatches, MoE layers (as many as stages, and more), kernels, fields of TrainConfig.
LAYOUTS = [
    ({"stage": 2, "fsdp": 2}, 8, 2, {}, {"microbatches_together": 4, "remat": "none"}),
    ({"stage": 4, "fsdp": 2}, 8, 4, {}, {}),
    ({"stage": 2, "expert": 4}, 2, 4, {}, {"remat": "k2"}),
    ({"stage": 2, "fsdp": 2, "replica": 2}, 8, 2, {}, {"microbatches_together": 2, "remat": "offload"}),
    ({"stage": 2, "fsdp": 2, "expert": 2}, 4, 4, {"exchange": "ring", "grouped_matmul": "ragged_dot"}, {}),
    ({"stage": 8}, 8, 8, {}, {}),
]


@pytest.mark.parametrize(
    ("axes", "num_microbatches", "num_moe", "kernels", "train"),
    [pytest.param(*case, marks=pytest.mark.grid if i else (), id=str(case[0])) for i, case in enumerate(LAYOUTS)],
)
def test_step_is_that_of_one_device(tiny, axes, num_microbatches, num_moe, kernels, train):
    """At the bounds of every other mesh: routing, loads and dropped rows alike, so no idle tick was counted."""
    axes, kernels, train = (tuple(d.items()) for d in (axes, kernels, train))
    got = one_step(tiny, axes, num_microbatches, kernels=kernels, num_layers=1 + num_moe, train=train)
    assert_same_step(one_step(tiny, (), 1, num_layers=1 + num_moe), got)


def traced_gradients(model, mesh, dtype="float32", remat="layer"):
    """Losses and gradients of a step with two MoE layers a stage, and eight microbatches of one row a device."""
    stages = mesh.shape["stage"]
    changes = {"data.batch_sequences": 8 * mesh.size // stages, "train.compute_dtype": dtype, "train.remat": remat}
    changes |= {f"mesh.{axis}": size for axis, size in mesh.shape.items()}
    config = make_config(model, 8, num_layers=1 + 2 * stages).replace(changes)
    with jax.set_mesh(mesh):
        state = abstract_state(config.validate(), make_optimizer(config, mesh), mesh)
        loss_fn = functools.partial(make_loss(config), rope=make_rope(config.model, "plain"))
        gradients = jax.jit(functools.partial(accumulate, loss_fn, 0.1))
        return gradients.trace(state.params, state.router_bias, abstract_batch(config, mesh))


def test_weights_move_once_a_step(tiny, mesh_of):
    """In every tick rows go to the next stage and to their experts, and nothing else moves."""
    ticks, turns, mesh = 9, 18, mesh_of(stage=2, fsdp=2, expert=2)
    compiled = traced_gradients(tiny, mesh).lower().compile()
    found = [c for c in collectives(compiled.as_text(), mesh.shape) if c.axes]
    in_ticks = Counter((c.kind, c.axes, c.runs) for c in found if c.runs != 1)
    # two rows, forwards and backwards: the stage's output, and one of the stream
    assert in_ticks.pop(("collective-permute", ("stage",), ticks)) == 4
    assert in_ticks and all(key[1:] == (("expert",), turns) for key in in_ticks), in_ticks
    moved = Counter(c.kind for c in found if c.runs == 1 and c.has_matrix)
    assert moved["all-gather"] > 20 and moved["reduce-scatter"] > 20


def test_weights_are_gathered_narrow_and_gradients_added_wide(tiny, mesh_of):
    """Read from the lowered step in bf16 compute: XLA's CPU backend has no collectives in bf16."""
    mesh = mesh_of(stage=2, fsdp=2, expert=2)
    text = traced_gradients(tiny, mesh, "bfloat16").lower().as_text()
    gathers = re.findall(r"stablehlo\.all_gather\".*-> tensor<(?:\d+x)+(\w+)>", text)
    # the router in float32, the counts of the exchange, and of the tokens of the head, which `tensor` shares
    assert Counter(gathers) == {"bf16": 23 + 1, "f32": 1, "i32": 3}
    scatters = re.findall(r"stablehlo\.reduce_scatter\".*?-> tensor<(?:\d+x)+(\w+)>", text, re.DOTALL)
    assert Counter(scatters) == {"f32": 24, "bf16": 1}


def test_expert_choice_is_not_made_again(tiny, mesh_of):
    """Neither by a stage nor by a layer in it: of a token's scores [T, X]; the balance loss, of [B, T, X], may be."""
    for remat in ("none", "k2", "layer"):
        found = equations(traced_gradients(tiny, mesh_of(stage=2), remat=remat).jaxpr.jaxpr)
        dims = Counter(e.invars[0].aval.ndim for e in found if e.primitive.name == "top_k")
        assert dims[2] == 1 and dims[3] > 1, (remat, dims)


class Added(nnx.Module):
    """y = x + the sum of a weight [L, Q, D] over L and Q."""

    def __init__(self, stack: Stack):
        self.w = stack.weight("Q>D", "w")


def test_gradients_are_summed_in_float32_over_microbatches(tiny, mesh_of):
    """512 bf16 gradients of 1 + 1/128: bf16 stops at 256, and what float32 gives here is exact.

    And outputs are where their inputs were, each stage sees a microbatch beside what is known of it, and no idle tick
    counts.
    """
    count, each, mesh = 512, 1 + 2**-7, mesh_of(stage=2, fsdp=2)
    graph, state = nnx.split(Added(Stack(tiny, 0, 2)))
    x_YBTD = np.broadcast_to(1 + np.arange(count, dtype=np.float32)[:, None, None, None] % 64, (count, 2, 1, 48))

    def run(layers, x_BTD, known, constants):
        routing = jnp.ones((1, 8), jnp.int32), jnp.ones(1, jnp.int32), jnp.ones(1)
        own = 1 + known[0] % 64 + tiny.q_lora_rank * jax.lax.axis_index("stage")
        apart = jnp.abs(x_BTD[..., 0] - own.astype(x_BTD.dtype)).astype(jnp.float32).max()
        y_BTD = x_BTD + layers.w.use(x_BTD.dtype).sum((0, 1)).astype(x_BTD.dtype)
        return y_BTD, LayerReport(apart * jnp.ones((1, 4)), *routing)

    def loss(w, x_YBTD, index_MBT):
        layers = nnx.merge(graph, jax.tree.map(lambda _: w, state))
        passed = pipelined(None, layers, run, place(x_YBTD.astype(jnp.bfloat16), "YBTD"), (index_MBT,), ())
        return jnp.sum(passed.y_YBTD.astype(jnp.float32)) * each, passed

    with jax.set_mesh(mesh):
        weight = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0].weight
        w = jax.device_put(np.ones(weight.shape, np.float32), jax.NamedSharding(mesh, weight.spec(mesh.shape)))
        index = place(jnp.asarray(np.broadcast_to(np.arange(count)[:, None, None], (count, 2, 1))), "MBT")
        grad, passed = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(w, x_YBTD, index))
    assert grad.dtype == np.float32
    np.testing.assert_array_equal(grad, 2 * count * each)
    np.testing.assert_array_equal(passed.y_YBTD.astype(np.float32), x_YBTD + weight.shape[0] * weight.shape[1])
    (report,) = passed.reports
    np.testing.assert_array_equal(report.max_logits, 0)
    np.testing.assert_array_equal(report.expert_load, 2 * count)
    np.testing.assert_array_equal(report.rows_dropped, 2 * count)
    np.testing.assert_array_equal(report.balance_loss, count)


def test_a_model_is_called_on_one_stage(tiny, mesh_of):
    tokens = jnp.zeros((2, 4), jnp.int32)
    params = jax.tree.map(lambda w: np.zeros(w.shape), declarations(tiny), is_leaf=lambda w: isinstance(w, Weight))
    with jax.set_mesh(mesh_of(stage=2)), pytest.raises(ValueError, match="stage = 2 has `losses` alone"):
        build_model(tiny, params, init_router_bias(tiny), jnp.float32)(tokens)


def test_a_run_goes_on_with_the_microbatches_that_stages_need(tiny, tmp_path):
    """Only sums are taken over microbatches, so their number is free as the mesh is."""
    config = make_config(tiny, 1, num_layers=4).replace({"train.run_dir": str(tmp_path)})
    write_config(tmp_path, config)
    by_stages = {"mesh.stage": 3, "train.num_microbatches": 6, "train.microbatches_together": 3}
    assert check_run_dir(config.replace(by_stages)).keys() == by_stages.keys()
