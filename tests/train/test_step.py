"""One training step is the same on every mesh and for every cut of its batch into microbatches."""

import contextlib
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.config import Config, DataConfig, MeshConfig, OptimConfig, PhasesConfig, TrainConfig
from k2jax.model import moe
from k2jax.model.moe import sequence_balance
from k2jax.model.rope import make_rope
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import spec
from k2jax.sharding.zigzag import zigzag
from k2jax.train.batch import Batch
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state
from k2jax.train.step import make_loss, make_train_step

NUM_ROWS, LENGTH = 32, 16
MESHES = [
    {},
    {"fsdp": 8},
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 4, "tensor": 2},
    {"context": 2, "expert": 4},
]
# One of each in every suite, the whole grid where there is time.
QUICK = [({}, 4), ({"fsdp": 2, "expert": 2, "tensor": 2}, 2), (MESHES[-2], 1)]
LAYOUTS = [
    pytest.param(axes, count, {}, marks=() if (axes, count) in QUICK else pytest.mark.grid, id=f"{axes}-{count}")
    for axes, count in itertools.product(MESHES, (1, 2, 4))
    if axes or count > 1
]
# The same for what is chosen instead of the defaults of a CPU, which are the dense exchange and the blocked matmul.
EXPERTS_TOO = [
    ({"context": 2, "expert": 4}, 1, {"exchange": "ring"}),
    ({"context": 2, "expert": 4}, 2, {"exchange": "ring", "grouped_matmul": "ragged_dot"}),
    ({"context": 2, "expert": 4}, 4, {"exchange": "ring"}),
    ({"context": 2, "expert": 4}, 1, {"grouped_matmul": "ragged_dot"}),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, 1, {"exchange": "ring"}),
    ({"expert": 8}, 1, {"exchange": "ring", "expert_buffer": 8.0}),
    ({}, 1, {"grouped_matmul": "ragged_dot"}),
]
LAYOUTS += [
    pytest.param(*case, marks=pytest.mark.grid if index else (), id="-".join(map(str, (*case[:2], *case[2].values()))))
    for index, case in enumerate(EXPERTS_TOO)
]


def make_config(model, num_microbatches, num_layers=2):
    """A learning rate that moves the weights, and a tau that clips some heads."""
    return Config(
        model=dataclasses.replace(model, num_hidden_layers=num_layers),
        optim=OptimConfig(
            learning_rate=1e-2,
            final_learning_rate=1e-2,
            warmup_tokens=0,
            ns_dtype="float32",
            qk_clip_tau=1.05,
            adam_eps=1e-3,  # with less, entries whose gradient is next to zero move by the sign of its rounding
        ),
        phases=PhasesConfig(balance_alpha=(0.1, 0.0)),  # large enough to be seen in the router's gradient
        data=DataConfig(sequence_length=LENGTH, batch_sequences=NUM_ROWS),
        train=TrainConfig(num_microbatches=num_microbatches, compute_dtype="float32"),
    )


def make_values(config):
    """Parameters, router bias and batch, drawn on the host."""
    rng = np.random.default_rng(0)
    draw = lambda w: rng.normal(w.init == "ones", 0.1, w.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, declarations(config.model), is_leaf=lambda w: isinstance(w, Weight))
    num_moe = config.model.num_hidden_layers - config.model.first_k_dense_replace
    bias = np.tile(rng.normal(0, 0.05, (1, config.model.n_routed_experts)).astype(np.float32), (num_moe, 1))
    tokens = rng.integers(0, config.model.vocab_size, (NUM_ROWS, LENGTH + 1), dtype=np.int32)
    segments = (np.arange(LENGTH) >= rng.integers(3, 9, (NUM_ROWS, 1))).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32) - segments * segments.argmax(1)[:, None].astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, segments)
    rows = (config.train.num_microbatches, -1, LENGTH)
    return params, {"moe": {"ffn": {"bias": bias}}}, jax.tree.map(lambda x: x.reshape(rows), batch)


@contextlib.contextmanager
def routing_in_balance_loss(bias):
    """Add to the reported balance loss a number that changes with any token's choice of experts."""
    weight_TX = np.random.default_rng(1).random((LENGTH, bias.shape[-1]), np.float32)

    def balance_and_routing(score_BTX, num_choices):
        _, expert_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTX) + bias[0], num_choices)
        chosen_BTX = zigzag((expert_BTA[..., None] == jnp.arange(bias.shape[-1])).any(-2), back=True)
        return sequence_balance(score_BTX, num_choices) + jnp.sum(jnp.mean(chosen_BTX * weight_TX, (0, 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "sequence_balance", balance_and_routing)
        yield


@functools.cache
def one_step(model, axes, num_microbatches, ns_dtype="float32", kernels=(), num_layers=2, train=()):
    """(state before, state after, metrics, compiled text) on the mesh of `axes`, a tuple of items; one compile each.

    kernels, train: items too, of KernelsConfig and TrainConfig.
    """
    config = make_config(model, num_microbatches, num_layers).replace({"optim.ns_dtype": ns_dtype})
    for section, items in {"mesh": axes, "kernels": kernels, "train": train}.items():
        config = config.replace({f"{section}.{name}": value for name, value in items})
    config.validate()
    params, bias, batch = make_values(config)
    mesh = make_mesh(MeshConfig(**dict(axes)), jax.devices()[: math.prod(dict(axes).values())])
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, mesh)
        abstract = abstract_state(config, tx, mesh)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
        state = dataclasses.replace(zeros, params=params, router_bias=bias)
        placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, abstract)
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec("MBT"))), batch)
        with routing_in_balance_loss(bias["moe"]["ffn"]["bias"]):
            lowered = jax.jit(make_train_step(config, tx)).lower(placed, batch)
        compiled = lowered.compile()
        after, metrics = compiled(placed, batch)
        same_layout = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), after, abstract)
        assert all(jax.tree.leaves(same_layout)), same_layout
    return state, *jax.device_get((after, metrics)), compiled.as_text()


def assert_close(got, want, rtol, path=()):
    """Relative to the largest entry: rounding is as large as that, whatever a small entry is."""
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max(), err_msg=name)


def assert_same_step(reference, got):
    """Losses, routing, gradients (as momentum), update, clip, bias, norm of what `one_step` gave.

    Float32 sums in another order; 485 times that after Newton-Schulz.
    """
    (before, after, metrics, _), (_, got_after, got_metrics, _) = reference, got
    assert not got_metrics.report.rows_dropped.any()
    for name in ("loss", "grad_norm", "learning_rate", "router_bias"):
        assert_close(getattr(got_metrics, name), getattr(metrics, name), 2e-6, (jax.tree_util.GetAttrKey(name),))
    for name in ("balance_loss", "max_logits"):
        pair = getattr(got_metrics.report, name), getattr(metrics.report, name)
        assert_close(*pair, 2e-6, (jax.tree_util.GetAttrKey(name),))
    np.testing.assert_array_equal(got_metrics.report.expert_load, metrics.report.expert_load)
    np.testing.assert_array_equal(got_after.router_bias["moe"]["ffn"]["bias"], after.router_bias["moe"]["ffn"]["bias"])
    assert got_after.step == after.step == 1
    moved, got_moved = (jax.tree.map(np.subtract, a.params, before.params) for a in (after, got_after))
    for got, want, rtol in (
        (got_after.params, after.params, 2e-6),  # 5e-7
        (got_after.opt_state, after.opt_state, 1e-5),  # 2e-6
    ):
        jax.tree_util.tree_map_with_path(lambda path, g, w, rtol=rtol: assert_close(g, w, rtol, path), got, want)
    # a move is known to the rounding of where it ends, which is much for gains, all near 1
    apart = jax.tree.map(
        lambda g, w, end: max(np.linalg.norm(g - w) - 6e-8 * np.linalg.norm(end), 0) / np.linalg.norm(w),
        got_moved,
        moved,
        after.params,
    )
    worst = max(jax.tree_util.tree_leaves_with_path(apart), key=lambda pair: pair[1])
    assert worst[1] < 1e-5, worst


@pytest.mark.parametrize(("axes", "num_microbatches", "kernels"), LAYOUTS)
def test_step_is_the_same_everywhere(tiny, axes, num_microbatches, kernels):
    """Against one device and one microbatch."""
    axes, kernels = tuple(axes.items()), tuple(kernels.items())
    assert_same_step(one_step(tiny, (), 1), one_step(tiny, axes, num_microbatches, kernels=kernels))


@pytest.mark.grid
def test_bf16_newton_schulz_differs_by_so_much(tiny):
    """One step of eight devices against one: bf16 makes of the gradients' last bits a share of the update."""
    cut = (("fsdp", 2), ("expert", 2), ("tensor", 2))
    (before, one, *_), (_, eight, *_) = (one_step(tiny, axes, 1, "bfloat16") for axes in ((), cut))

    def apart(path, start, a, b):
        if jax.tree_util.keystr(path).count("norm") or path[0].key in ("embedding", "head"):
            return 0.0  # AdamW's
        return np.linalg.norm(a - b) / np.linalg.norm(a - start)

    worst = max(jax.tree.leaves(jax.tree_util.tree_map_with_path(apart, before.params, one.params, eight.params)))
    assert 1e-4 < worst < 5e-2  # measured: 0.03


def test_routing_is_seen(tiny):
    """Or equal routing would be no finding: one token that chooses otherwise moves the number a hundred bounds."""
    with routing_in_balance_loss(bias := np.zeros((1, 8), np.float32)):
        score = np.random.default_rng(0).random((NUM_ROWS, LENGTH, 8), np.float32)
        other = score.copy()
        other[3, 5] = np.roll(other[3, 5], 1)
        a, b = (float(moe.sequence_balance(jnp.asarray(s), 2)) for s in (score, other))
    assert bias.shape[-1] == tiny.n_routed_experts and abs(a - b) > 100 * 2e-6 * a


def test_step_did_something(tiny):
    """Or the comparison above would be of nothing: every parameter and every bias moved, some heads were clipped."""
    before, after, metrics, _ = one_step(tiny, (), 1)
    for path, moved in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, after.params, before.params)):
        assert np.abs(moved).max() > 1e-3, jax.tree_util.keystr(path)
    assert np.abs(after.router_bias["moe"]["ffn"]["bias"] - before.router_bias["moe"]["ffn"]["bias"]).max() > 5e-4
    assert 0 < np.sum(metrics.report.max_logits > 1.05) < metrics.report.max_logits.size
    assert metrics.report.expert_load.sum() == NUM_ROWS * LENGTH * tiny.num_experts_per_tok
    assert metrics.grad_norm > 0.1
    assert metrics.learning_rate == pytest.approx(1e-2)


def test_experts_are_reached_by_all_to_all(tiny):
    """On expert = 8 the compiled step exchanges rows; on one device it has nothing to exchange with."""
    assert "all-to-all(" in one_step(tiny, (("expert", 8),), 1)[3]
    assert "all-to-all(" not in one_step(tiny, (), 1)[3]


def test_loss_is_nats_per_token(tiny):
    """A head of zeros gives log(vocab_size), whatever the rest."""
    config = make_config(tiny, 1)
    params, bias, batch = make_values(config)
    params["head"] = np.zeros_like(params["head"])
    rope = make_rope(tiny, "plain")
    loss = jax.jit(make_loss(config))(params, bias, jax.tree.map(lambda x: jnp.asarray(x[0]), batch), rope).loss
    assert loss / (NUM_ROWS * LENGTH) == pytest.approx(np.log(tiny.vocab_size), rel=1e-6)
