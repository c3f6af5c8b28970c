"""The figures of a compiled step, for `k2jax plan` and benchmarks/programs.py."""

from collections import Counter

import jax

from k2jax.config import Config
from k2jax.model.flops import flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.plan.chips import network_of
from k2jax.plan.collectives import part_of, part_of_name
from k2jax.plan.layer_metrics import LayerMetrics
from k2jax.plan.program import Program
from k2jax.plan.schedule import Played, Rates
from k2jax.tables import aligned

GIB = 2**30
# Shares of the peaks. Nothing here was measured on the machines: a step is no faster than at "peak"; between "good" and
# "poor" lies what well-tuned and ordinary programs reach of each. SparseCore's share is a guess.
RATES = {
    "peak": Rates(),
    "good": Rates(matmul=0.75, hbm=0.8, links=0.8, sparse_core=0.5),
    "poor": Rates(matmul=0.6, hbm=0.7, links=0.7, sparse_core=0.5),
}


SUMS = ("runs", "bytes", "seconds", "exposed_seconds", "compute_seconds")


def _transfers(played: Played) -> list[dict]:
    """Of one step: collectives by part, kind, axes and whether they are asynchronous; seconds of all their runs."""
    table = {}
    for (_, transfer), runs in played.transfers.items():
        one = transfer.collective
        key = part_of(one), one.kind, one.axes, transfer.is_async
        row = table.setdefault(key, dict.fromkeys(SUMS, 0))
        row["runs"] += runs
        row["bytes"] += runs * one.array_bytes
        row["seconds"] += runs * transfer.seconds
        row["exposed_seconds"] += runs * transfer.exposed
        row["compute_seconds"] += runs * transfer.compute
    rows = [
        {"part": part, "kind": kind, "axes": list(axes), "asynchronous": is_async, **row}
        for (part, kind, axes, is_async), row in table.items()
        if axes
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def describe_program(text: str, config: Config, mesh: jax.sharding.Mesh) -> dict:
    """JSON values of a step's scheduled HLO. Raises UserError for devices without figures."""
    program = Program(text, config, network_of(mesh))
    weights = weight_leaves(declarations(config.model))
    per_token = flops_per_token(weights, config.model, config.data.sequence_length)
    model_flops = per_token * config.batch_tokens / mesh.size
    times = {}
    for name, rates in RATES.items():
        played = program.play(rates)
        times[name] = {
            "rates": rates._asdict(),
            "seconds": played.seconds,
            "exposed_seconds": played.exposed,
            "waiting_for_memory_seconds": played.exposed_other,
            "model_flops_utilisation": model_flops / program.network.chip.flops / played.seconds,
        }
    played = program.play()
    return {
        "times": times,
        "flops": played.work.flops,
        "flops_over_model": played.work.flops / model_flops,
        "hbm_bytes": played.work.hbm_bytes,
        "layer": LayerMetrics(program).describe() if program.layer_bodies else None,
        "transfers": _transfers(played),
        "assumptions": [assumption._asdict() for assumption in program.loops.assumptions.values()],
        "unknown_kernels": program.unknown_kernels,
    }


def layer_lines(layer: dict) -> list[str]:
    """`LayerMetrics.describe` as text."""
    dot = layer["ragged_dot_over_useful"]
    rows = [
        ("of a MoE layer and microbatch", "", f"{layer['runs']:.0f} of them"),
        ("time at the peaks", f"{1e3 * layer['seconds']:.1f}", "ms"),
        ("communication", f"{1e3 * layer['communication_seconds']:.1f}", "ms"),
        ("of it exposed", f"{1e3 * layer['exposed_seconds']:.1f}", "ms"),
        ("FLOPs executed / the model's", f"{layer['flops_over_model']:.3f}", ""),
        ("HBM per token", f"{layer['hbm_bytes_per_token'] / 1e6:.1f}", "MB"),
        ("crossings of the exchange", f"{layer['crossings']:.2f}", ""),
        ("synchronous collectives > 64 MiB", str(layer["synchronous_collectives"]), ""),
        ("ragged_dot, time / useful FLOPs' time", "none" if dot is None else f"{dot:.3f}", ""),
        ("largest array of logits in HBM", f"{layer['quadratic_attention_bytes'] / 1e6:.0f}", "MB"),
        ("fills, masks, relayouts of rows", f"{layer['row_bytes'] / 1e9:.1f}", "GB"),
    ]
    return aligned(rows)


def program_lines(found: dict) -> list[str]:
    """`describe_program` as text."""
    times = [("the step, played", "matmul", "HBM", "links", "SparseCore", "s", "exposed s", "MFU")]
    for name, one in found["times"].items():
        shares = [f"{share:.0%}" for share in one["rates"].values()]
        times.append(
            (
                name,
                *shares,
                f"{one['seconds']:.3g}",
                f"{one['exposed_seconds']:.3g}",
                f"{one['model_flops_utilisation']:.1%}",
            )
        )
    traffic = [("part", "collective", "over", "", "runs", "GiB", "ideal s", "exposed s", "compute beside it, s")]
    for row in found["transfers"]:
        traffic.append(
            (
                row["part"],
                row["kind"],
                ", ".join(row["axes"]),
                "async" if row["asynchronous"] else "sync",
                f"{row['runs']:,.0f}",
                f"{row['bytes'] / GIB:.2f}",
                f"{row['seconds']:.3f}",
                f"{row['exposed_seconds']:.3f}",
                f"{row['compute_seconds']:.3f}",
            )
        )
    assumptions = Counter((a["turns"], a["reason"], part_of_name(a["op_name"])) for a in found["assumptions"])
    assumed = [
        f"assumed of {count} loops of the {part}: {turns:g} turns, {reason}"
        for (turns, reason, part), count in assumptions.items()
    ]
    unknown = [f"no FLOPs are known of the kernel {name}" for name in found["unknown_kernels"]]
    return [
        *aligned(times),
        f"FLOPs executed / the model's: {found['flops_over_model']:.3f}",
        f"HBM: {found['hbm_bytes'] / 1e12:.3g} TB a device",
        "",
        *(layer_lines(found["layer"]) if found["layer"] else ["no loop over MoE layers"]),
        "",
        *aligned(traffic),
        *assumed,
        *unknown,
    ]
