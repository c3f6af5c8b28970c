"""A config from abstract shapes alone: counts, FLOPs, the layout and optimizer state of every parameter."""

import math

import jax

from k2jax.config import Config
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.model.transformer import bias_declarations, declarations
from k2jax.model.weights import Weight, weight_leaves
from k2jax.plan.muon_work import assignment_lines, describe_assignments
from k2jax.sharding.names import AXES
from k2jax.tables import aligned
from k2jax.train.optimizer import optimizer_bytes


def _axes(weight: Weight, sizes: dict[str, int]) -> list[list[str] | None]:
    """The mesh axes over which each dim is cut at rest; the router bias is whole on every device."""
    if weight.group is None:
        return [None] * len(weight.shape)
    entries = weight.spec(sizes)
    return [None if entry is None else [entry] if isinstance(entry, str) else list(entry) for entry in entries]


def _bytes_per_device(weight: Weight, sizes: dict[str, int]) -> int:
    """Float32 bytes of a weight's part on one device. Cut dims divide evenly, Config.validate saw to that."""
    return 4 * weight.size // math.prod(sizes[axis] for entry in _axes(weight, sizes) for axis in entry or ())


def _entry(name: str, weight: Weight, sizes: dict[str, int], optimizer_bytes: int) -> dict:
    own = _bytes_per_device(weight, sizes)
    return {
        "name": name,
        "published_name": weight.hf,
        "component": weight.component,
        "dims": weight.dims,
        "shape": list(weight.shape),
        "spec": _axes(weight, sizes),
        "bytes_per_device": own,
        "optimizer": weight.group,
        "optimizer_bytes_per_device": optimizer_bytes,
    }


def describe(config: Config) -> dict:
    """JSON values: counts by component, FLOPs per token, mesh, bytes per device, and each parameter."""
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    weights = declarations(config.model)
    counts = count_parameters(weight_leaves(weights), config.model)
    totals, active = ({name: pair[i] for name, pair in counts.items()} for i in (0, 1))
    all_active, tables = sum(active.values()), active["embedding"] + active["head"]
    named = jax.tree_util.tree_leaves_with_path(
        {"params": weights, "router_bias": bias_declarations(config.model)}, is_leaf=lambda x: isinstance(x, Weight)
    )
    state, rest = optimizer_bytes(config, sizes)
    names = [".".join(entry.key for entry in path) for path, _ in named]
    entries = [
        _entry(name, weight, sizes, state.get(name.removeprefix("params."), 0) if name.startswith("params.") else 0)
        for name, (_, weight) in zip(names, named, strict=True)
    ]
    return {
        "parameters": {
            "total": sum(totals.values()),
            "total_non_embedding": sum(totals.values()) - tables,
            "activated": all_active,
            "activated_non_embedding": all_active - tables,
            "total_by_component": totals,
            "activated_by_component": active,
        },
        "flops_per_token": flops_per_token(weight_leaves(weights), config.model, config.data.sequence_length),
        "mesh": sizes | {"devices": math.prod(sizes.values())},
        "bytes_per_device": {
            "parameters": sum(e["bytes_per_device"] for e in entries),
            "optimizer": sum(e["optimizer_bytes_per_device"] for e in entries) + rest,
        },
        "weights": entries,
        "optimizer_assignment": describe_assignments(config),
    }


def _count(value: float) -> str:
    return f"{value:,.0f}"


def tables(found: dict) -> str:
    """`describe` as text: counts, then a line per parameter."""
    parameters, device = found["parameters"], found["bytes_per_device"]
    by_total, by_active = parameters["total_by_component"], parameters["activated_by_component"]
    rows = [("", "total", "activated per token")]
    rows += [(name, _count(by_total[name]), _count(by_active[name])) for name in by_total]
    rows += [("sum", _count(parameters["total"]), _count(parameters["activated"]))]
    rows += [
        ("without embedding and head", *(_count(parameters[f"{k}_non_embedding"]) for k in ("total", "activated")))
    ]
    lines = [f"{name:<28}{total:>24}{active:>24}" for name, total, active in rows]
    sizes = {axis: size for axis, size in found["mesh"].items() if axis != "devices"}
    lines += [
        "",
        f"{found['flops_per_token']:.4g} FLOP per token, forward and backward",
        f"mesh: {'  '.join(f'{axis} {size}' for axis, size in sizes.items())}: {found['mesh']['devices']:,} devices",
        f"per device: {_count(device['parameters'])} bytes of float32 parameters, "
        f"{_count(device['optimizer'])} bytes of optimizer state",
        "",
    ]
    header = ("parameter", "dims", "shape", "spec", "optimizer", "bytes per device")
    table = [header]
    for entry in found["weights"]:
        spec = ", ".join("+".join(axes) if axes else "-" for axes in entry["spec"])
        shape = " x ".join(map(str, entry["shape"]))
        table.append(
            (entry["name"], entry["dims"], shape, spec, entry["optimizer"] or "-", _count(entry["bytes_per_device"]))
        )
    return "\n".join([*lines, *aligned(table), "", *assignment_lines(found["optimizer_assignment"])])
