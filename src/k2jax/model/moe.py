"""Feed-forward layers: SwiGLU, and the mixture of experts with a sigmoid router (DeepSeek-V3 report 2.1.2).

E experts as owners of weights, X experts as the router's scores, A experts of a token,
W rows that the experts of one device work on
"""

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.kernels.grouped_matmul import grouped_matmul
from k2jax.kernels.project import project
from k2jax.model.weights import RouterBias, Stack, wide
from k2jax.sharding.exchange import exchange_experts
from k2jax.sharding.names import AXES
from k2jax.sharding.rules import on_mesh, spec


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) of width F."""

    def __init__(self, stack: Stack, width: int, component: str):
        self.gate = stack.weight("D>F", F=width, component=component)
        self.up = stack.weight("D>F", F=width, component=component)
        self.down = stack.weight("F>D", F=width, component=component)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate.use(dtype))
        up_BTF = project("BTD,DF->BTF", x_BTD, self.up.use(dtype))
        return project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down.use(dtype))


def choose_experts(score_TX: jax.Array, bias_X: jax.Array, num_choices: int, factor: float):
    """The experts [T, A] with the highest biased scores, and their weights [T, A] from the unbiased ones.

    DeepSeek-V3 report eq. 12-16: the bias only selects. Weights are renormalised to sum to `factor`.
    """
    _, expert_TA = jax.lax.top_k(score_TX + bias_X, num_choices)
    weight_TA = jnp.take_along_axis(score_TX, expert_TA, -1)
    return expert_TA, weight_TA / (weight_TA.sum(-1, keepdims=True) + 1e-20) * factor


class MoE(nnx.Module):
    """Routed experts plus shared ones, which see every token and are not weighted."""

    def __init__(self, stack: Stack):
        config = stack.config
        width = config.moe_intermediate_size
        self.config = config
        self.router = stack.weight("D>X", component="router")
        self.bias = RouterBias(jax.ShapeDtypeStruct((stack.num_layers, config.n_routed_experts), jnp.float32))
        self.gate = stack.weight("D>F", stack="E", F=width, component="routed experts")
        self.up = stack.weight("D>F", stack="E", F=width, component="routed experts")
        self.down = stack.weight("F>D", stack="E", F=width, component="routed experts")
        if config.n_shared_experts:
            self.shared = SwiGLU(stack, config.n_shared_experts * width, "shared experts")

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, D] and the rows that each expert worked on, over the whole batch: int32 [E]."""
        dtype = x_BTD.dtype
        # At least float32, and in full: bf16 logits, which accelerators make of float32 by default, would flip choices.
        router_DX = self.router.use(wide(dtype))
        logit_BTX = project("BTD,DX->BTX", x_BTD.astype(router_DX.dtype), router_DX, precision="highest")
        weights = [w.use(dtype) for w in (self.gate, self.up, self.down)]
        routed, in_dims = self._routed, ("BTD", "BTX", "X", "EDF", "EDF", "EFD")
        if on_mesh():
            routed = jax.shard_map(routed, in_specs=tuple(map(spec, in_dims)), out_specs=(spec("BTD"), spec("E")))
        y_BTD, load_E = routed(x_BTD, jax.nn.sigmoid(logit_BTX), self.bias[...], *weights)
        if self.config.n_shared_experts:
            y_BTD += self.shared(x_BTD)
        return y_BTD, load_E

    def _routed(self, x_BTD, score_BTX, bias_X, *weights):
        """The routed experts on the tokens of one device; every array here is local."""
        config = self.config
        axis, num_shards = ("expert", jax.lax.axis_size("expert")) if on_mesh() else (None, 1)
        if on_mesh():  # said before use, so that autodiff sums the weights' gradients over the devices that share them
            weights = [jax.lax.pcast(w, tuple(a for a in AXES if a != "expert"), to="varying") for w in weights]
        gate_EDF, up_EDF, down_EFD = weights

        def experts(row_WD, group_sizes_E):
            gate_WF = grouped_matmul(row_WD, gate_EDF, group_sizes_E)
            up_WF = grouped_matmul(row_WD, up_EDF, group_sizes_E)
            return grouped_matmul(jax.nn.silu(gate_WF) * up_WF, down_EFD, group_sizes_E)

        score_TX = score_BTX.reshape(-1, score_BTX.shape[-1])
        expert_TA, weight_TA = choose_experts(
            score_TX, bias_X, config.num_experts_per_tok, config.routed_scaling_factor
        )
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_TD, load_E = exchange_experts(x_TD, expert_TA, weight_TA, experts, config.n_routed_experts, axis, num_shards)
        if on_mesh():
            load_E = jax.lax.psum(load_E, tuple(a for a in AXES if a != "expert"))
        return y_TD.reshape(x_BTD.shape), load_E
