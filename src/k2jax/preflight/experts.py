"""The start-up check of the routed experts: exchange and grouped matmul."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from k2jax.config import Config
from k2jax.model.choices import describe_experts
from k2jax.model.moe import MoE, choose_experts
from k2jax.model.weights import Param, RouterBias, Stack
from k2jax.preflight import compare as size
from k2jax.preflight.compare import CheckResult, difference, on_one_device
from k2jax.sharding.compile_options import program_options
from k2jax.sharding.place import place, whole


def _dense_experts(params, x_BTD, score_BTX, bias_X, model) -> jax.Array:
    """Every expert on every token, with weight zero where it was not chosen: no exchange, no sorting, no kernel."""
    expert_TA, weight_TA = choose_experts(score_BTX.reshape(-1, score_BTX.shape[-1]), bias_X, model)
    weight_TX = jnp.sum((expert_TA[..., None] == jnp.arange(model.n_routed_experts)) * weight_TA[..., None], 1)
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])

    @jax.checkpoint  # or the backward pass would hold every expert's product for every token
    def add(y_TD, expert):
        weight_T, gate_DF, up_DF, down_FD = expert
        hidden_TF = jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)
        return y_TD + weight_T[:, None] * (hidden_TF @ down_FD), None

    of_experts = weight_TX.T, params["gate"], params["up"], params["down"]
    return jax.lax.scan(add, jnp.zeros_like(x_TD), of_experts)[0].reshape(x_BTD.shape)


def _expert_values(model, mesh: jax.sharding.Mesh):
    """(experts' weights, tokens, scores), bias, output gradient: drawn on the host, alike on every process; skewed.

    Scores are given, not computed: two programs' rounding would choose other experts for some token of very many.
    """
    rng = np.random.default_rng(0)
    experts = model.n_routed_experts
    wide, narrow = (experts, size.HIDDEN, size.WIDTH), (experts, size.WIDTH, size.HIDDEN)
    shapes = {"gate": wide, "up": wide, "down": narrow}
    params = {name: rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    rows = size.num_rows(mesh)
    tokens = min(size.TOKENS, max(size.FEWEST, size.ALL_TOKENS // mesh.size))
    length = mesh.shape["context"] * mesh.shape["tensor"] * tokens
    x_BTD, dy_BTD = rng.normal(size=(2, rows, length, size.HIDDEN)).astype(np.float32)
    score_BTX = rng.random((rows, length, experts), np.float32)
    bias_X = (0.3 / np.arange(1, experts + 1)).astype(np.float32)
    return (params, x_BTD, score_BTX), bias_X, dy_BTD


def check_experts(config: Config, mesh: jax.sharding.Mesh) -> CheckResult | None:
    """The routed experts: exchange and grouped matmul. Without a bound on buffers, which drops rows by intent."""
    if config.model.first_k_dense_replace == config.model.num_hidden_layers:
        return None
    narrow = {"hidden_size": size.HIDDEN, "moe_intermediate_size": size.WIDTH, "n_shared_experts": 0}
    model = dataclasses.replace(config.model, **narrow)
    kernels = dataclasses.replace(config.kernels, expert_buffer=None)
    graph, *_ = nnx.split(MoE(Stack(model, 0, 1, kernels)), Param, RouterBias)
    router = np.zeros((size.HIDDEN, model.n_routed_experts), np.float32)  # merged with the rest and not used
    arguments, bias_X, dy_BTD = _expert_values(model, mesh)
    dtype = jnp.dtype(config.train.compute_dtype)

    def layer(params, x_BTD, score_BTX):
        moe = nnx.merge(graph, params | {"router": router}, {"bias": bias_X})
        y_BTD, load_E, _ = moe.routed(place(x_BTD, "BTD").astype(dtype), place(score_BTX, "BTX"))
        return y_BTD.astype(jnp.float32), load_E

    def chosen_path(arguments, dy_BTD):
        y_BTD, pull, load_E = jax.vjp(layer, *arguments, has_aux=True)
        return jax.tree.map(whole, (y_BTD, *pull(place(dy_BTD, "BTD")), load_E))

    def dense_path(arguments, dy_BTD):
        params, x_BTD, score_BTX = arguments
        params, x_BTD = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), (params, x_BTD))
        y_BTD, pull = jax.vjp(lambda *a: _dense_experts(*a, bias_X, model), params, x_BTD, score_BTX)
        return y_BTD, *pull(dy_BTD)

    y, dparams, dx, dscore, load = jax.device_get(jax.jit(chosen_path, compiler_options=program_options(config.kernels, mesh))(arguments, dy_BTD))
    want_y, want_dparams, want_dx, want_dscore = on_one_device(dense_path, arguments, dy_BTD)
    found = [difference("output", y, want_y), difference("gradient of the tokens", dx, want_dx)]
    found += [difference(f"gradient of {name}", dparams[name], want_dparams[name]) for name in sorted(dparams)]
    found += [difference("gradient of the scores", dscore, want_dscore)]
    found += [difference("number of rows", load.sum(), y.shape[0] * y.shape[1] * model.num_experts_per_tok)]
    remedy = "set kernels.exchange = 'dense' and kernels.grouped_matmul = 'ragged_dot'"
    return CheckResult(describe_experts(dataclasses.replace(config, kernels=kernels), mesh), found, remedy)
