"""Every remat policy gives the same loss and gradients, repeats what it says, and keeps less the further it goes."""

import dataclasses
import functools
import typing
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import k2jax
from k2jax.config import Config, KernelsConfig, Remat, TrainConfig
from k2jax.model.layer_report import LayerReport
from k2jax.model.rope import make_rope
from k2jax.model.transformer import declarations, init_router_bias
from k2jax.model.weights import init_params
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.step import Losses, accumulate, make_loss

NUM_ROWS, LENGTH = 16, 16
CUT = (("fsdp", 2), ("expert", 2), ("tensor", 2))
MESHES = [pytest.param((), id="one device"), pytest.param(CUT, id="eight devices", marks=pytest.mark.grid)]
POLICIES = [policy for policy in typing.get_args(Remat) if policy != "none"]
SOME = [pytest.param(policy, marks=() if policy in ("layer", "k2") else pytest.mark.grid) for policy in POLICIES]


def make_batch(model) -> Batch:
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (NUM_ROWS, LENGTH + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (NUM_ROWS, LENGTH))
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.zeros_like(positions))


def mean_loss(model, remat: str, dtype: str):
    """loss(params, batch) in nats per token, with the balance loss."""
    loss_fn = make_loss(Config(model=model, train=TrainConfig(compute_dtype=dtype, remat=remat)))

    def loss(params, batch):
        losses = loss_fn(params, init_router_bias(model), batch, make_rope(model, "plain"))
        return losses.loss / batch.inputs.size + 0.1 * losses.report.balance_loss.sum()

    return loss


@functools.cache
def gradients(model, axes: tuple, remat: str):
    """(loss, gradients, memory analysis) of the model with nine layers."""
    model = dataclasses.replace(model, num_hidden_layers=9)
    mesh = k2jax.mesh_of(**dict(axes))
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_params(declarations(model), jax.random.key(0), 0.1))()
        batch = jax.device_put(make_batch(model), jax.NamedSharding(mesh, spec("BT")))
        lowered = jax.jit(jax.value_and_grad(mean_loss(model, remat, "float32"))).lower(params, batch)
        compiled = lowered.compile()
        return *jax.device_get(compiled(params, batch)), compiled.memory_analysis()


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("remat", SOME)
def test_same_loss_and_gradients(tiny, remat, axes):
    """Float32; a layer's sums may be fused otherwise where they are made again: 1.3e-6 of the largest entry."""
    loss, grads, _ = gradients(tiny, axes, "none")
    got_loss, got_grads, _ = gradients(tiny, axes, remat)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got_grads), strict=True):
        assert np.abs(want).max() > 0, path
        assert np.abs(got - want).max() < 3e-6 * np.abs(want).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("remat, offloaded", [("layer", "offload"), ("k2", "k2-offload")])
def test_offload_is_the_same_bit_for_bit(tiny, remat, offloaded, axes):
    """Offloaded activations come back as they were."""
    (loss, grads, _), (got_loss, got_grads, _) = (gradients(tiny, axes, r) for r in (remat, offloaded))
    assert got_loss == loss
    jax.tree.map(np.testing.assert_array_equal, got_grads, grads)


@pytest.mark.parametrize("axes", MESHES)
def test_memory_falls_in_the_documented_order(tiny, axes):
    """docs/memory.md. The CPU's compiler counts the host's memory as the device's, so offload is at most alike here."""
    kept = {r: gradients(tiny, axes, r)[2].temp_size_in_bytes for r in ("none", *POLICIES)}
    assert kept["k2"] < 0.6 * kept["none"] and kept["layer"] < 0.75 * kept["k2"], kept
    assert kept["k2-offload"] <= kept["k2"] and kept["offload"] <= kept["layer"], kept


def equations(jaxpr):
    """Every equation, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


def forward_matmuls(model, remat: str) -> Counter:
    """Forward multiplications by each weight of a layer in the gradient's program; weights by their shapes."""
    weights = {w.shape[1:]: w for w in jax.tree.leaves(declarations(model), is_leaf=lambda x: hasattr(x, "hf"))}
    params = init_params(declarations(model), jax.random.key(0), 0.1)
    batch = jax.tree.map(jnp.asarray, make_batch(model))
    jaxpr = jax.make_jaxpr(jax.grad(mean_loss(model, remat, "float32")))(params, batch)
    found = Counter()
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            (x_dims, w_dims), _ = equation.params["dimension_numbers"]
            for operand, dims in zip(equation.invars, (x_dims, w_dims), strict=True):
                weight = weights.get(operand.aval.shape)
                if weight is not None and tuple(sorted(dims)) == tuple(range(weight.num_inputs)):
                    found[weight.hf.removeprefix("model.layers.{L}.")] += 1
    return found


def test_each_policy_repeats_what_it_says(tiny):
    """Counted in the gradient's program, of one dense stack: K2 repeats the MLA up-projections, `layer` all but the
    last, whose output is only added to the stream. kv_b is not here: attention multiplies by parts of it, chunk by chunk,
    and again in its own backward pass, whatever the policy."""
    model = dataclasses.replace(tiny, num_hidden_layers=2, first_k_dense_replace=2)
    once = forward_matmuls(model, "none")
    assert len(once) == 6 and once.pop("mlp.up_proj.weight") == 2, once  # gate and up have one shape
    assert set(once.values()) == {1}
    up = {"self_attn.q_b_proj.weight"}
    for remat in POLICIES:
        want = {name: 1 + (name in up if "k2" in remat else name != "mlp.down_proj.weight") for name in once}
        want["mlp.up_proj.weight"] = 2 if "k2" in remat else 4
        assert forward_matmuls(model, remat) == want, remat


@pytest.mark.parametrize("remat, matmuls, crossings", [("none", 6, 6), ("k2", 6, 6), ("layer", 7, 7)])
def test_neither_the_last_matmul_of_the_experts_nor_its_way_is_made_again(tiny, mesh_of, remat, matmuls, crossings):
    """In the gradient's program of one stack of layers. Matmuls: gate and up at once, and down, forward 2, backward 4.
    Crossings: rows out and back, their weights out, and the three gradients. `layer` makes gate and up again, and for
    them the rows cross again; their weights do not."""
    kernels = KernelsConfig(grouped_matmul="ragged_dot", exchange="dense")
    loss_fn = make_loss(Config(model=tiny, kernels=kernels, train=TrainConfig(compute_dtype="float32", remat=remat)))
    params = init_params(declarations(tiny), jax.random.key(0), 0.1)
    with jax.set_mesh(mesh_of(expert=4)):
        batch = jax.device_put(make_batch(tiny), jax.NamedSharding(mesh_of(expert=4), spec("BT")))
        loss = lambda p: loss_fn(p, init_router_bias(tiny), batch, make_rope(tiny, "plain")).loss  # noqa: E731
        found = Counter(e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert (found["ragged_dot_general"], found["all_to_all"]) == (matmuls, crossings)


def test_expert_choice_is_not_made_again(tiny):
    """Under no policy: the backward pass has no top-k of its own but the balance loss's."""
    params = init_params(declarations(tiny), jax.random.key(0), 0.1)
    batch = jax.tree.map(jnp.asarray, make_batch(tiny))
    for remat in POLICIES:
        loss_fn = make_loss(Config(model=tiny, train=TrainConfig(compute_dtype="float32", remat=remat)))
        loss = lambda p, f=loss_fn: f(p, init_router_bias(tiny), batch, make_rope(tiny, "plain")).loss  # noqa: E731
        found = Counter(e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
        assert found["top_k"] == 2, (remat, found["top_k"])  # the choice, and sequence_balance


def test_gradients_are_summed_in_float32_over_microbatches():
    """512 bf16 gradients of 1 + 1/128: bf16 stops at 256, and what float32 gives here is exact."""
    count, each = 512, 1 + 2**-7

    def loss_fn(params, router_bias, batch):
        loss = jnp.sum(params["w"].astype(jnp.bfloat16)) * jnp.bfloat16(each)
        return Losses(loss.astype(jnp.float32) * count, LayerReport(*[jnp.zeros(1)] * 4))

    batch = Batch(*[jnp.zeros((count, 1, 1), jnp.int32)] * 4)
    _, grads = jax.jit(functools.partial(accumulate, loss_fn, 0.0))({"w": jnp.zeros(3)}, {}, batch)
    assert grads["w"].dtype == jnp.float32
    np.testing.assert_array_equal(grads["w"], count * each)
