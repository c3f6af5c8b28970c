"""The mesh as a picture: text for a terminal, or a PNG."""

import math

from k2jax.config import Config
from k2jax.errors import UserError


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
    """The mesh as a PNG: one square per device, coloured by its experts. UserError if it cannot be drawn."""
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
