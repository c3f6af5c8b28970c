"""Loss and max logit of one or more runs as a PNG."""

from pathlib import Path

from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.runs.folder import read_config
from k2jax.runs.mirror import open_run_folder
from k2jax.runs.records import read_records


def read_run(run_dir: str) -> tuple[Config, list[dict]]:
    """Config and records of a run; raises UserError if there are none."""
    files = open_run_folder(run_dir)
    config = read_config(files.path)
    records = read_records(files.metrics)
    if not records:
        raise UserError(f"{run_dir}: has no finished step yet")
    return config, records


def plot_runs(run_dirs: list[str], out: str) -> None:
    """Write the PNG `out`: training loss, largest max logit with its tau, and clipped heads of every run."""
    if Path(out).suffix != ".png" or not Path(out).parent.is_dir() or Path(out).is_dir():
        raise UserError(f"out = {out!r}: must be a file name that ends in .png, in a folder that is there")
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, logit_axes, head_axes) = pyplot.subplots(
        3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 3, 1.3), constrained_layout=True
    )
    for index, run_dir in enumerate(run_dirs):
        config, records = read_run(run_dir)
        color, tau = f"C{index}", config.optim.qk_clip_tau
        name = f"{Path(run_dir).name} ({f'tau {tau:g}' if tau is not None else 'no clip'})"
        tokens = [r["tokens"] for r in records]
        loss_axes.plot(tokens, [r["loss"] for r in records], color=color, linewidth=1, label=name)
        logit_axes.plot(tokens, [r["max_logit"] for r in records], color=color, linewidth=1.2, label=name)
        head_axes.plot(tokens, [r["heads_clipped"] for r in records], color=color, linewidth=1)
        if tau is not None:
            logit_axes.axhline(tau, color=color, linestyle=":", linewidth=1.2, label=f"tau = {tau:g}")
    loss_axes.set_ylabel("training loss (nats per token)")
    logit_axes.set_ylabel("largest attention logit of the step")
    head_axes.set_ylabel("heads clipped")
    head_axes.set_xlabel("tokens")
    head_axes.set_ylim(bottom=0)
    for axes in (loss_axes, logit_axes, head_axes):
        axes.grid(alpha=0.3)
    loss_axes.legend()
    logit_axes.legend()
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise UserError(f"out = {out!r}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
