"""What a config means, from abstract shapes alone: counts, FLOPs, every parameter's layout, a picture of the mesh."""

import math

import jax

from k2jax.config import Config, UserError
from k2jax.model.flops import count_parameters, flops_per_token
from k2jax.model.transformer import bias_declarations, declarations
from k2jax.model.weights import Weight
from k2jax.sharding.names import AXES
from k2jax.train.plan_table import describe_plan, plan_lines
from k2jax.train.state import weight_leaves

_STATE_BUFFERS = {"muon": 1, "adamw": 2, None: 0}  # momentum; both moments


def _axes(weight: Weight, sizes: dict[str, int]) -> list[list[str] | None]:
    """The mesh axes over which each dim is cut at rest; the router bias is whole on every device."""
    if weight.group is None:
        return [None] * len(weight.shape)
    entries = weight.spec(sizes)
    return [None if entry is None else [entry] if isinstance(entry, str) else list(entry) for entry in entries]


def _bytes_per_device(weight: Weight, sizes: dict[str, int]) -> int:
    """Float32 bytes of a weight's part on one device. Cut dims divide evenly, Config.validate saw to that."""
    return 4 * weight.size // math.prod(sizes[axis] for entry in _axes(weight, sizes) for axis in entry or ())


def _entry(name: str, weight: Weight, sizes: dict[str, int]) -> dict:
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
        "optimizer_bytes_per_device": own * _STATE_BUFFERS[weight.group],
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
    entries = [_entry(".".join(entry.key for entry in path), weight, sizes) for path, weight in named]
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
            "optimizer": sum(e["optimizer_bytes_per_device"] for e in entries),
        },
        "weights": entries,
        "optimizer_plan": describe_plan(config),
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
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", *plan_lines(found["optimizer_plan"])])


def _span(total: int, parts: int, index: int) -> str:
    size = total // parts
    return f"{index * size}-{(index + 1) * size - 1}" if size > 1 else str(index * size)


def _grid(config: Config) -> tuple[list[str], list[str]]:
    """Row and column labels of the mesh drawn flat: batch and sequence downward, experts and heads across."""
    mesh, model = config.mesh, config.model
    down = [
        f"replica {r}" + f" stage {s}" * (mesh.stage > 1) + f" fsdp {f}" + f" context {c}" * (mesh.context > 1)
        for r in range(mesh.replica)
        for s in range(mesh.stage)
        for f in range(mesh.fsdp)
        for c in range(mesh.context)
    ]
    across = [
        f"E {_span(model.n_routed_experts, mesh.expert, e)} H {_span(model.num_attention_heads, mesh.tensor, t)}"
        for e in range(mesh.expert)
        for t in range(mesh.tensor)
    ]
    return down, across


def _device(config: Config, row: int, column: int) -> int:
    """Number of the device at a place of the flat drawing; the mesh's own order is that of AXES."""
    mesh = config.mesh
    outer, context = divmod(row, mesh.context)
    expert, tensor = divmod(column, mesh.tensor)
    return ((outer * mesh.expert + expert) * mesh.tensor + tensor) * mesh.context + context


def draw_mesh(config: Config, width: int) -> str:
    """The mesh as text for a terminal of `width` columns: which experts (E) and heads (H) each device has."""
    down, across = _grid(config)
    head = max(map(len, down)) + 2
    cell = max([*map(len, across), 8]) + 2
    columns, rows = min(len(across), max((width - head) // cell, 1)), min(len(down), 8)
    lines = [" " * head + "".join(f"{label:<{cell}}" for label in across[:columns])]
    for row in range(rows):
        devices = [f"dev {_device(config, row, column)}" for column in range(columns)]
        lines.append(f"{down[row]:<{head}}" + "".join(f"{device:<{cell}}" for device in devices))
    left = len(down) * len(across) - rows * columns
    lines = [line.rstrip() for line in lines]
    return "\n".join([*lines, *([f"... and {left} devices more (all of them: --png FILE)"] if left else [])])


def plot_mesh(config: Config, out: str) -> None:
    """The mesh as a PNG: one square per device, coloured by its experts. UserError where it cannot be drawn."""
    if not out.endswith(".png"):
        raise UserError(f"--png {out}: must end in .png")
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    down, across = _grid(config)
    shape = len(down), len(across)
    figure, axes = pyplot.subplots(
        figsize=(min(3 + 0.9 * shape[1], 24), min(1.5 + 0.4 * shape[0], 24)), constrained_layout=True
    )
    colors = [[column // config.mesh.tensor % 20 for column in range(shape[1])]] * shape[0]
    axes.imshow(colors, cmap="tab20", vmin=0, vmax=19, aspect="auto", alpha=0.6)
    axes.set_xticks([c - 0.5 for c in range(1, shape[1])], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, shape[0])], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    if math.prod(shape) <= 1024:
        for row in range(shape[0]):
            for column in range(shape[1]):
                axes.text(column, row, _device(config, row, column), ha="center", va="center", fontsize=8)
    for ticks, labels in ((axes.set_xticks, across), (axes.set_yticks, down)):
        step = -(-len(labels) // 32)
        ticks(range(0, len(labels), step), labels[::step], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_title(
        f"{math.prod(shape):,} devices: E experts and H heads across, batch and sequence downward", fontsize=9
    )
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"--png {out}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
