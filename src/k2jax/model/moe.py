"""Feed-forward layers: SwiGLU, and the mixture of experts with a sigmoid router (DeepSeek-V3 report 2.1.2).

E experts as owners of weights, X experts as the router's scores, A experts of a token,
W rows that the experts of one device work on
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.dtypes import wide
from k2jax.kernels.grouped_matmul import choose_grouped_matmul, grouped_matmul
from k2jax.kernels.project import project
from k2jax.model.layer_report import LayerReport
from k2jax.model.remat import DISPATCHED, EXPERT_CHOICE, GATE_UP, ROUTER_LOGITS, ROW_WEIGHT, named
from k2jax.model.weights import RouterBias, Stack
from k2jax.sharding.exchange import choose_transport, exchange_experts
from k2jax.sharding.place import on_mesh, platform, replicated, uncut_axes
from k2jax.sharding.rules import spec


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) of width F."""

    def __init__(self, stack: Stack, width: int, component: str, hf: str):
        self.gate = stack.weight("D>F", hf + "gate_proj.weight", F=width, component=component)
        self.up = stack.weight("D>F", hf + "up_proj.weight", F=width, component=component)
        self.down = stack.weight("F>D", hf + "down_proj.weight", F=width, component=component)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF = named(project("BTD,DF->BTF", x_BTD, self.gate.use(dtype)), GATE_UP)
        up_BTF = named(project("BTD,DF->BTF", x_BTD, self.up.use(dtype)), GATE_UP)
        return project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down.use(dtype))


def keep_best_groups(choice_TX: jax.Array, n_group: int, topk_group: int) -> jax.Array:
    """Biased scores with -inf outside of each token's best groups; a group's score is the sum of its two best.

    DeepSeek-V3 report 2.1.2 (node-limited routing), with the published inference code's mask.
    """
    if n_group == topk_group:
        return choice_TX
    grouped = choice_TX.reshape(len(choice_TX), n_group, -1)
    _, best = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), topk_group)
    kept = (best[..., None] == jnp.arange(n_group)).any(1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice_TX.shape)


def choose_experts(score_TX: jax.Array, bias_X: jax.Array, config: ModelConfig):
    """The experts [T, A] with the highest biased scores, and their weights [T, A] from the unbiased ones.

    DeepSeek-V3 report eq. 12-16: the bias only selects. Weights are renormalised to sum to routed_scaling_factor.
    """
    choice_TX = keep_best_groups(score_TX + bias_X, config.n_group, config.topk_group)
    expert_TA = named(jax.lax.top_k(choice_TX, config.num_experts_per_tok)[1], EXPERT_CHOICE)
    weight_TA = jnp.take_along_axis(score_TX, expert_TA, -1)
    return expert_TA, weight_TA / (weight_TA.sum(-1, keepdims=True) + 1e-20) * config.routed_scaling_factor


def sequence_balance(score_BTX: jax.Array, num_choices: int) -> jax.Array:
    """Mean over sequences of sum_i f_i P_i: 1 where all experts are used alike, more where some are favoured.

    DeepSeek-V3 report eq. 17-20: f_i is the share of choices that expert i gets without the bias, times the number of
    experts, and has no gradient; P_i is its mean share of the scores. A sequence is a row of the batch.
    """
    num_tokens, num_experts = score_BTX.shape[1:]
    _, expert_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTX), num_choices)
    count_BX = jnp.sum(expert_BTA[..., None] == jnp.arange(num_experts), (1, 2))
    share_BX = jnp.mean(score_BTX / score_BTX.sum(-1, keepdims=True), 1)
    return jnp.mean(jnp.sum(count_BX * share_BX, -1)) * (num_experts / (num_choices * num_tokens))


class MoE(nnx.Module):
    """Routed experts plus shared ones, which see every token and are not weighted."""

    def __init__(self, stack: Stack):
        config = stack.config
        width = config.moe_intermediate_size
        routed = {"stack": "E", "F": width, "component": "routed experts"}
        self.config, self.kernels = config, stack.kernels
        self.router = stack.weight("D>X", "mlp.gate.weight", component="router")
        self.bias = stack.weight(
            ">X", "mlp.gate.e_score_correction_bias", kind=RouterBias, init="zeros", group=None, component="router"
        )
        self.gate = stack.weight("D>F", "mlp.experts.{E}.gate_proj.weight", **routed)
        self.up = stack.weight("D>F", "mlp.experts.{E}.up_proj.weight", **routed)
        self.down = stack.weight("F>D", "mlp.experts.{E}.down_proj.weight", **routed)
        if config.n_shared_experts:
            self.shared = SwiGLU(stack, config.n_shared_experts * width, "shared experts", "mlp.shared_experts.")

    def __call__(self, x_BTD: jax.Array, layout: Literal["T", "S"] = "T") -> tuple[jax.Array, LayerReport]:
        """Output [B, T, D], and the routing of the whole batch as a LayerReport without max_logits.

        layout: of the tokens. With S each device along `tensor` has, and works on, all of them.
        """
        dtype = x_BTD.dtype
        # At least float32, and in full: bf16 logits, which accelerators make of float32 by default, would flip choices.
        router_DX = self.router.use(wide(dtype))
        logit_BTX = project("BTD,DX->BTX", x_BTD.astype(router_DX.dtype), router_DX, precision="highest")
        logit_BTX = named(logit_BTX, ROUTER_LOGITS)
        score_BTX = jax.nn.sigmoid(logit_BTX)
        y_BTD, load_E, dropped = self.routed(x_BTD, score_BTX, layout)
        if self.config.n_shared_experts:
            y_BTD += self.shared(x_BTD)
        balance = sequence_balance(score_BTX, self.config.num_experts_per_tok)
        return y_BTD, LayerReport(None, load_E, dropped, balance)

    def routed(self, x_BTD, score_BTX, layout: Literal["T", "S"] = "T") -> tuple[jax.Array, jax.Array, jax.Array]:
        """Output [B, T, D] of the routed experts, load_E and the number of dropped rows."""
        weights = [w.use(x_BTD.dtype) for w in (self.gate, self.up, self.down)]
        x_dims, score_dims = f"B{layout}D", f"B{layout}X"
        alike = uncut_axes(x_dims) if on_mesh() else ()
        local, in_dims = partial(self._routed, on_mesh(), alike), (x_dims, score_dims, "X", "EDF", "EDF", "EFD")
        if on_mesh():
            out_specs = spec(x_dims), spec("E"), spec("")
            local = jax.shard_map(local, in_specs=tuple(map(spec, in_dims)), out_specs=out_specs)
        return local(x_BTD, score_BTX, self.bias[...], *weights)

    @jax.named_scope("experts")
    def _routed(self, is_cut, alike, x_BTD, score_BTX, bias_X, *weights):
        """The routed experts on the tokens of one device; every array here is local.

        is_cut: whether what other devices share and count is to be added up here; a pipeline does it once a step.
        alike: mesh axes along which devices have the same tokens, to be counted once.
        """
        shared = lambda dims: tuple(axis for axis in uncut_axes(dims) if axis not in alike)  # noqa: E731
        config, kernels = self.config, self.kernels
        num_shards = jax.sharding.get_abstract_mesh().shape.get("expert", 1)
        if is_cut:
            weights = [replicated(w, shared("EDF")) for w in weights]
        gate_EDF, up_EDF, down_EFD = weights
        multiply = choose_grouped_matmul(kernels, platform())

        def experts(row_WD, weight_W, group_sizes_E):
            row_WD, weight_W = named(row_WD, DISPATCHED), named(weight_W, ROW_WEIGHT)
            both = named(grouped_matmul(row_WD, (gate_EDF, up_EDF), group_sizes_E, multiply), GATE_UP)
            gate_WF, up_WF = jnp.split(both, 2, 1)
            # Weighted before the last matmul, whose output the backward pass then never needs: neither it nor its way.
            hidden_WF = (jax.nn.silu(gate_WF) * up_WF * weight_W[:, None]).astype(row_WD.dtype)
            return grouped_matmul(hidden_WF, (down_EFD,), group_sizes_E, multiply)

        score_TX = score_BTX.reshape(-1, score_BTX.shape[-1])
        expert_TA, weight_TA = choose_experts(score_TX, bias_X, config)
        transport = choose_transport(kernels, platform(), num_shards, config.num_experts_per_tok)
        y_TD, load_E, dropped = exchange_experts(
            x_BTD.reshape(-1, x_BTD.shape[-1]), expert_TA, weight_TA, experts, config.n_routed_experts, "expert",
            num_shards, transport, kernels.expert_buffer,
        )  # fmt: skip
        if is_cut:
            load_E = jax.lax.psum(load_E, shared("E"))
            dropped = jax.lax.psum(dropped, shared(""))
        return y_TD.reshape(x_BTD.shape), load_E, dropped
