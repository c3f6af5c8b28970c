"""The start banner: what is about to run, where, and how large it is."""

import math
from collections import Counter

import jax

from k2jax.config import Config
from k2jax.model.choices import describe_attention, describe_experts, describe_pipeline
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.preflight.ranks import versions
from k2jax.sharding.compile_options import describe_options
from k2jax.sharding.host_picture import picture_hosts
from k2jax.train.state import TrainState
from k2jax.words import counted

SHOWN = ("k2jax", "jax", "flax", "optax", "python")


def _si(value: float, unit: str = "") -> str:
    for prefix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def bytes_per_device(tree) -> int:
    """Of a pytree of arrays or ShapeDtypeStructs that have shardings; without what the device's tiling adds."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def total_bytes(tree) -> int:
    """Of a pytree of arrays or ShapeDtypeStructs, each counted once."""
    return sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(tree))


def banner(config: Config, abstract: TrainState, mesh: jax.sharding.Mesh) -> str:
    """Versions, devices, mesh and its hosts, parameters, bytes per device, FLOPs per token, optimizer groups."""
    leaves, optimizer_groups = weight_leaves(declarations(config.model)), Counter()
    for weight in leaves:
        optimizer_groups[weight.group] += weight.size
    counts = count_parameters(leaves, config.model)
    total, active = (sum(c[i] for c in counts.values()) for i in (0, 1))
    library = versions()
    device = mesh.devices.flat[0]
    groups = ", ".join(f"{name} {_si(size)}" for name, size in optimizer_groups.items())
    if config.optim.optimizer != "muonclip":  # a chain of one's own does with the labels what it wants
        groups = f"labelled {groups}"
    microbatches = config.train.num_microbatches
    flops = flops_per_token(leaves, config.model, config.data.sequence_length)
    lines = [
        ("versions", "  ".join(f"{name} {library[name]}" for name in SHOWN)),
        ("devices", f"{mesh.size} x {device.device_kind} ({device.platform})"),
        ("mesh", "  ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        *(("", line) for line in picture_hosts(mesh)),
        ("parameters", f"{_si(total)} total, {_si(active)} activated per token ({total:,} / {active:,})"),
        ("", ", ".join(f"{name} {_si(c[0])}" for name, c in counts.items())),
        ("pipeline", describe_pipeline(config)),
        ("experts", describe_experts(config, mesh)),
        ("optimizer", f"{config.optim.optimizer}: {groups} parameters; QK-Clip tau {config.optim.qk_clip_tau}"),
        ("per device", f"{_si(bytes_per_device(abstract.params), 'B')} parameters, "
                       f"{_si(bytes_per_device(abstract.opt_state), 'B')} optimizer state"),
        ("attention", describe_attention(config, mesh)),
        ("compiler", describe_options(config.kernels, mesh)),
        ("per token", f"{_si(flops, 'FLOP')} forward and backward"),
        ("batch", f"{config.data.batch_sequences} x {config.data.sequence_length} = {config.batch_tokens:,} tokens, "
                  f"{counted(microbatches, 'microbatch', 'microbatches')}; {counted(config.train.num_steps, 'step')}, "
                  f"{_si(config.train.num_steps * config.batch_tokens, 'tokens')}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<11}{text}" for name, text in lines)
