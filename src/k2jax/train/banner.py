"""The start banner: what is about to run, where, and how large it is."""

import importlib.metadata
import math
import platform

import jax

from k2jax.config import Config
from k2jax.kernels.grouped_matmul import choose_grouped_matmul
from k2jax.model.attention import chunk_tokens
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.sharding.exchange import choose_transport
from k2jax.train.state import TrainState, weight_leaves

LIBRARIES = ("k2jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
SHOWN = ("k2jax", "jax", "flax", "optax", "python")


def versions() -> dict[str, str]:
    """Python's and each library's version."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "


def bytes_per_device(tree) -> int:
    """Of a pytree of arrays or ShapeDtypeStructs that have shardings; without what the device's tiling adds."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def describe_attention(config: Config) -> str:
    """By what it is computed."""
    if config.kernels.attention == "tokamax":
        return "tokamax"
    return f"chunks of {chunk_tokens(config.data.sequence_length, config.kernels)} queries and keys"


def describe_experts(config: Config, mesh: jax.sharding.Mesh) -> str:
    """Which exchange and which grouped matmul the routed experts use on `mesh`."""
    device, num_shards, kernels = mesh.devices.flat[0].platform, mesh.shape["expert"], config.kernels
    transport = choose_transport(kernels, device, num_shards, config.model.num_experts_per_tok)
    room = "room for all rows" if kernels.expert_buffer is None else f"room for {kernels.expert_buffer} balanced loads"
    exchange = "no exchange, one shard" if transport == "local" else f"exchange {transport} x {num_shards}, {room}"
    return f"{exchange}; grouped matmul {choose_grouped_matmul(kernels, device)}"


def describe_pipeline(config: Config) -> str:
    """Who has which layers, and how long devices wait: each pass is as many ticks longer as there are other stages."""
    stages, microbatches = config.mesh.stage, config.train.microbatches_together or config.train.num_microbatches
    if stages == 1:
        return "one stage"
    layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
    idle = (stages - 1) / (microbatches + stages - 1)
    return f"{stages} stages of {layers // stages} MoE layers, {microbatches} microbatches in a pass, {idle:.1%} idle"


def banner(
    config: Config, weights, abstract: TrainState, mesh: jax.sharding.Mesh, optimizer_groups: dict[str, int]
) -> str:
    """Versions, devices, mesh, parameters, bytes per device, FLOPs per token, optimizer groups."""
    leaves = weight_leaves(weights)
    counts = count_parameters(leaves, config.model)
    total, active = (sum(c[i] for c in counts.values()) for i in (0, 1))
    library = versions()
    device = mesh.devices.flat[0]
    groups = ", ".join(f"{name} {_si(size)}" for name, size in optimizer_groups.items())
    flops = flops_per_token(leaves, config.model, config.data.sequence_length)
    lines = [
        ("versions", "  ".join(f"{name} {library[name]}" for name in SHOWN)),
        ("devices", f"{mesh.size} x {device.device_kind} ({device.platform})"),
        ("mesh", "  ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        ("parameters", f"{_si(total)} total, {_si(active)} activated per token ({total:,} / {active:,})"),
        ("", ", ".join(f"{name} {_si(c[0])}" for name, c in counts.items())),
        ("pipeline", describe_pipeline(config)),
        ("experts", describe_experts(config, mesh)),
        ("optimizer", f"{config.optim.optimizer}: {groups} parameters; QK-Clip tau {config.optim.qk_clip_tau}"),
        ("per device", f"{_si(bytes_per_device(abstract.params))}B parameters, "
                       f"{_si(bytes_per_device(abstract.opt_state))}B optimizer state"),
        ("attention", describe_attention(config)),
        ("per token", f"{_si(flops)}FLOP forward and backward"),
        ("batch", f"{config.data.batch_sequences} x {config.data.sequence_length} = {config.batch_tokens:,} tokens, "
                  f"{config.train.num_microbatches} microbatches; {config.train.num_steps:,} steps, "
                  f"{_si(config.train.num_steps * config.batch_tokens)}tokens"),
    ]  # fmt: skip
    return "\n".join(f"{name:<11}{text}" for name, text in lines)
