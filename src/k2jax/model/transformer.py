"""The Kimi K2 decoder: embedding, dense layers, MoE layers, norm, untied head.

B sequences, T positions, D hidden, V vocabulary, H heads, L layers of one stack
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import ModelConfig
from k2jax.kernels.project import project
from k2jax.model.mla import MLA, Positions, rms_norm
from k2jax.model.moe import MoE, SwiGLU
from k2jax.model.rope import rope_angles
from k2jax.model.weights import Param, RouterBias, Stack, Weight, declare, dim_sizes, wide
from k2jax.sharding.rules import out_spec, place, whole


class Output(NamedTuple):
    """logits [B, T, V] and max_logits [layers, H] in at least float32, expert_load [MoE layers, E] int32."""

    logits: jax.Array
    max_logits: jax.Array
    expert_load: jax.Array


class Layer(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, stack: Stack, is_moe: bool):
        self.config = stack.config
        self.attention_norm = stack.gain("D")
        self.attention = MLA(stack)
        self.ffn_norm = stack.gain("D")
        self.ffn = MoE(stack) if is_moe else SwiGLU(stack, stack.config.intermediate_size, "dense ffn")

    def __call__(self, x_BTD: jax.Array, positions: Positions):
        eps = self.config.rms_norm_eps
        attended_BTD, max_logit_H = self.attention(rms_norm(x_BTD, self.attention_norm, eps), positions)
        x_BTD += attended_BTD
        normed_BTD = rms_norm(x_BTD, self.ffn_norm, eps)
        y_BTD, load_E = self.ffn(normed_BTD) if isinstance(self.ffn, MoE) else (self.ffn(normed_BTD), None)
        return x_BTD + y_BTD, (max_logit_H, load_E)


def scan_layers(layers: Layer, x_BTD: jax.Array, positions: Positions, remat: bool):
    """Run a stack of equal layers in one scan, so that compile time does not grow with depth."""
    graph, weights = nnx.split(layers)

    def run(x_BTD, weights):
        return nnx.merge(graph, weights)(x_BTD, positions)

    return jax.lax.scan(jax.checkpoint(run) if remat else run, x_BTD, weights)


def make_positions(positions_BT: jax.Array, segment_ids_BT: jax.Array, config: ModelConfig) -> Positions:
    """Rotation angles, and who sees whom: same document, not in the future."""
    angles_BT = rope_angles(positions_BT, config.qk_rope_head_dim, config.rope_theta)
    index_S = jnp.arange(positions_BT.shape[1])
    segment_BS, segment_BZ = place(segment_ids_BT, "BS"), place(segment_ids_BT, "BZ")
    visible_BSZ = (segment_BS[:, :, None] == segment_BZ[:, None, :]) & (place(index_S, "S")[:, None] >= index_S)
    return Positions(place(angles_BT, "BSR"), place(angles_BT, "BZR"), visible_BSZ)


class Transformer(nnx.Module):
    """The whole model; parameters are declared here and have no values until `nnx.merge` brings some."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32, remat: bool = False):
        num_dense = config.first_k_dense_replace
        num_moe = config.num_hidden_layers - num_dense
        sizes = dim_sizes(config)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embedding = declare("", "V", "D", sizes, group="adamw", component="embedding")
        self.dense = Layer(Stack(config, 0, num_dense), is_moe=False) if num_dense else None
        self.moe = Layer(Stack(config, num_dense, num_moe), is_moe=True) if num_moe else None
        self.norm = declare("", "", "D", sizes, init="ones", group="adamw", component="norms")
        self.head = declare("", "D", "V", sizes, group="adamw", component="head")

    def __call__(self, tokens_BT: jax.Array, positions_BT=None, segment_ids_BT=None) -> Output:
        """tokens, positions, segment_ids: int32 [B, T]. Positions count from 0 and all is one document unless given."""
        if positions_BT is None:
            positions_BT = place(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), "BT")
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros_like(tokens_BT)
        positions = make_positions(positions_BT, segment_ids_BT, self.config)
        # Cast after the look-up: the gradient of a frequent token's row is a sum that bf16 cannot hold.
        rows_BTD = self.embedding.use(wide(self.dtype)).at[tokens_BT].get(out_sharding=out_spec("BTD"))
        x_BTD = rows_BTD.astype(self.dtype)
        max_logits, loads = [], []
        for layers in (self.dense, self.moe):
            if layers is not None:
                x_BTD, (max_logit_LH, load_LE) = scan_layers(layers, x_BTD, positions, self.remat)
                max_logits.append(whole(max_logit_LH))
                loads += [whole(load_LE)] if load_LE is not None else []
        x_BTD = rms_norm(x_BTD, self.norm, self.config.rms_norm_eps)
        logits_BTV = project("BTD,DV->BTV", x_BTD, self.head.use(self.dtype), None, wide(self.dtype))
        no_load = jnp.zeros((0, self.config.n_routed_experts), jnp.int32)
        return Output(logits_BTV, jnp.concatenate(max_logits), jnp.concatenate(loads) if loads else no_load)


def declarations(config: ModelConfig) -> dict:
    """Pytree of Weight, in the shape of the parameters' pytree."""
    state = nnx.state(Transformer(config), Param)
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.weight, state, is_leaf=lambda x: isinstance(x, Param)))


def build_model(
    config: ModelConfig, params: dict, router_bias: dict, dtype: jnp.dtype, remat: bool = False
) -> Transformer:
    """The model with these values: pytrees as `declarations` and `init_router_bias` shape them."""
    graph, _, _ = nnx.split(Transformer(config, dtype, remat), Param, RouterBias)
    return nnx.merge(graph, params, router_bias)


def init_router_bias(config: ModelConfig) -> dict:
    """All zeros: float32 [MoE layers, E] under the model's own path to it."""
    bias = nnx.to_pure_dict(nnx.state(Transformer(config), RouterBias))
    return jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), bias)


__all__ = ["Output", "Transformer", "Weight", "build_model", "declarations", "init_router_bias"]
