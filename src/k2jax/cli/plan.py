"""`k2jax inspect`, `plan` and `plot`."""

import json
import shutil
from pathlib import Path

from k2jax.cli.overrides import load_config, override
from k2jax.config import Config
from k2jax.files import is_url
from k2jax.launch.distributed import use_cpu_devices
from k2jax.runs.folder import read_config


def _open_config(source: str, rest: list[str]) -> Config:
    """The config of a file or of a run directory, with the options."""
    if not is_url(source) and not Path(source).is_dir():
        return override(load_config(source), rest)
    from k2jax.runs.mirror import open_run_folder

    return override(read_config(open_run_folder(source).path), rest)


def inspect(args, rest: list[str]) -> int:
    """Print what a config means, from abstract shapes."""
    config = _open_config(args.config, rest)
    from k2jax.plan.mesh_picture import draw_mesh, plot_mesh
    from k2jax.plan.parameters import describe, tables

    found = describe(config)
    if args.png:
        plot_mesh(config, args.png)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(tables(found))
    print(draw_mesh(config, shutil.get_terminal_size((120, 24)).columns))
    return 0


def plan(args, rest: list[str]) -> int:
    """Compile the step of a config for a topology, and print what it needs."""
    config = _open_config(args.config, rest)
    use_cpu_devices(1)  # whatever is here takes no part
    from k2jax.plan.aot import describe_step, plan_lines
    from k2jax.plan.topology import topology_mesh

    found = describe_step(config, topology_mesh(config.mesh, args.topology))
    print(json.dumps(found, indent=2) if args.json else "\n".join(plan_lines(found)))
    return 0


def plot(args, rest: list[str]) -> int:
    from k2jax.report.curves import plot_runs

    plot_runs(args.run, args.out)
    print(args.out)
    return 0
