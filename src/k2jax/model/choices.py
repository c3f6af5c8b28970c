"""The implementations that the model runs on this mesh, in words: attention, experts, pipeline."""

import jax

from k2jax.config import Config
from k2jax.kernels.grouped_matmul import choose_grouped_matmul
from k2jax.model.attention import choose_attention, chunk_tokens
from k2jax.sharding.exchange import choose_transport


def describe_attention(config: Config, mesh: jax.sharding.Mesh) -> str:
    """By what it is computed on `mesh`."""
    device, context, length = mesh.devices.flat[0].platform, mesh.shape["context"], config.data.sequence_length
    if choose_attention(config.kernels, device, length, context) == "tokamax":
        return "tokamax's splash kernel" if device == "tpu" else "tokamax's kernels"
    return f"chunks of {chunk_tokens(length, config.kernels)} queries and keys"


def describe_experts(config: Config, mesh: jax.sharding.Mesh) -> str:
    """The exchange and the grouped matmul that the routed experts use on `mesh`."""
    device, num_shards, kernels = mesh.devices.flat[0].platform, mesh.shape["expert"], config.kernels
    transport = choose_transport(kernels, device, num_shards, config.model.num_experts_per_tok)
    room = "room for all rows" if kernels.expert_buffer is None else f"room for {kernels.expert_buffer} balanced loads"
    exchange = "no exchange, one shard" if transport == "local" else f"exchange {transport} x {num_shards}, {room}"
    multiply = choose_grouped_matmul(kernels, device)
    dense = " (dense on a GPU: all rows once for each expert)" if (multiply, device) == ("ragged_dot", "gpu") else ""
    return f"{exchange}; grouped matmul {multiply}{dense}"


def describe_pipeline(config: Config) -> str:
    """Layers per stage, and the share of time that devices wait: a pass takes one tick more for each further stage."""
    stages, microbatches = config.mesh.stage, config.train.microbatches_together or config.train.num_microbatches
    if stages == 1:
        return "one stage"
    layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
    idle = (stages - 1) / (microbatches + stages - 1)
    return f"{stages} stages of {layers // stages} MoE layers, {microbatches} microbatches in a pass, {idle:.1%} idle"
