"""The compiled program of Kimi K2 on 1,024 chips that are not here, as figures with bounds: docs/planning.md.

    pip install -e '.[tpu-compiler]'
    python benchmarks/programs.py [--layers] [--section.field value ...]

--layers compiles the MoE layers alone, in half of the time, and leaves out what only the whole step has. Exits with 1
where a figure is beyond its bound. Nothing runs: times are played at the peaks, so they compare programs.
"""

import argparse
import sys
from typing import NamedTuple

from k2jax.cli.overrides import load_config, override
from k2jax.errors import RunFailed, UserError
from k2jax.launch.distributed import use_cpu_devices
from k2jax.tables import aligned


class Bound(NamedTuple):
    """The largest value that a figure may have."""

    name: str
    path: tuple[str, ...]  # in what `describe_step` or `describe_layers` returns
    limit: float
    scale: float = 1.0
    unit: str = ""


OF_LAYERS = [
    Bound("HBM per token, layer and microbatch", ("layer", "hbm_bytes_per_token"), 20, 1e6, "MB"),
    Bound("FLOPs executed / the model's", ("layer", "flops_over_model"), 1.31),
    Bound("crossings of the exchange", ("layer", "crossings"), 5.1),  # 5 of rows; numbers that travel with them
    Bound("synchronous collectives > 64 MiB", ("layer", "synchronous_collectives"), 0),
    Bound("ragged_dot, time / useful FLOPs' time", ("layer", "ragged_dot_over_useful"), 1.08),
    Bound("largest array of logits in HBM", ("layer", "quadratic_attention_bytes"), 0, 1e6, "MB"),
    Bound("fills, masks, relayouts of rows", ("layer", "row_bytes"), 40, 1e9, "GB"),
]
OF_STEP = [
    Bound("the step, played at the peaks", ("program", "times", "peak", "seconds"), 73, 1, "s"),
    Bound("of it exposed communication", ("program", "times", "peak", "exposed_seconds"), 17, 1, "s"),
    Bound("memory of a device", ("memory", "total"), 53, 2**30, "GiB"),
]
# Of each topology. The same program on 1,024 H100 joins here, with its bounds, as soon as `plan` compiles for GPUs.
BOUNDS = {"v5p:8x8x16": (OF_LAYERS, OF_STEP)}


def figure(found: dict, bound: Bound) -> float | None:
    """None where the program has no such thing."""
    for key in bound.path:
        found = found[key]
    return None if found is None else found / bound.scale


def held(found: dict, bounds: list[Bound]) -> tuple[list[str], int]:
    """A table of the figures and their bounds, and how many are beyond."""
    rows, beyond = [("", "is", "at most", "", "")], 0
    for bound in bounds:
        value = figure(found, bound)
        is_beyond = value is not None and value > bound.limit
        beyond += is_beyond
        shown = "none" if value is None else f"{value:.4g}"
        rows.append((bound.name, shown, f"{bound.limit:g}", bound.unit, "OVER" * is_beyond))
    return aligned(rows), beyond


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:8x8x16", choices=BOUNDS, help="default: %(default)s")
    parser.add_argument("--config", default="configs/k2_1t.py", help="default: %(default)s")
    parser.add_argument("--layers", action="store_true", help="the MoE layers alone")
    args, rest = parser.parse_known_args()
    use_cpu_devices(1)
    from k2jax.plan.aot import describe_step, plan_lines
    from k2jax.plan.layer_program import describe_layers
    from k2jax.plan.program_report import layer_lines
    from k2jax.plan.topology import topology_mesh

    of_layers, of_step = BOUNDS[args.topology]
    try:
        config = override(load_config(args.config), rest)
        mesh = topology_mesh(config.mesh, args.topology)
        if args.layers:
            found, bounds = describe_layers(config, mesh), of_layers
            print("\n".join(layer_lines(found["layer"])))
        else:
            found = describe_step(config, mesh)
            found, bounds = found | {"layer": found["program"]["layer"]}, of_layers + of_step
            print("\n".join(plan_lines(found)))
    except (UserError, RunFailed) as error:
        print(error, file=sys.stderr)
        return 1
    if found["layer"] is None:
        print("the program has no loop over MoE layers: nothing to hold to bounds", file=sys.stderr)
        return 1
    table, beyond = held(found, bounds)
    print("\n".join(["", *table, "", f"{beyond} beyond their bounds" if beyond else "all bounds kept"]))
    return bool(beyond)


if __name__ == "__main__":
    sys.exit(main())
