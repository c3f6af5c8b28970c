"""The optimizer's assignment in `k2jax inspect`: matrices per device, traffic, FLOPs."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from k2jax.config import Config
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim.assignment import Assignment, load_per_device, make_assignments, matrix_flops
from k2jax.optim.muon import MatrixView, matrix_shape
from k2jax.optim.setup import map_weights
from k2jax.optim.spread import CHUNK_BYTES
from k2jax.sharding.names import AXES
from k2jax.tables import aligned
from k2jax.train.optimizer import muon_parameters

# Whole matrices that a device holds at a time for each one of a chunk: what it received or makes of it, two in
# Newton-Schulz, and one in another layout.
AT_A_TIME = 4


def _temp_bytes(assignment: Assignment, matrix_bytes: int) -> int:
    """An estimate for the time that a leaf is worked on: the parts held of all its matrices, and a chunk of whole ones.

    XLA's own figure for K2 is within a fifth of it on 1,024 TPU v5p, within a half on 4,096 (tests/optim/test_tpu.py).
    """
    slots = min(max(CHUNK_BYTES // matrix_bytes, 1), assignment.worked)
    return assignment.held * matrix_bytes // assignment.group + AT_A_TIME * slots * matrix_bytes


def _entry(name: str, weight, assignment: Assignment, config: Config) -> dict:
    n, m = matrix_shape(weight.shape, MatrixView(weight.num_stack, weight.num_inputs))
    matrix_bytes = n * m * np.dtype(config.optim.ns_dtype).itemsize
    flops = matrix_flops(weight.shape, weight.num_stack, weight.num_inputs, config.optim.ns_steps)
    return {
        "name": name,
        "matrix": [n, m],
        "matrices": math.prod(weight.shape[: weight.num_stack]),
        "slots_per_device": assignment.worked,
        "padding": assignment.padding,
        "copies": assignment.copies,
        "bytes_moved_each_way": assignment.worked * matrix_bytes * (assignment.group - 1) // assignment.group,
        "flops_per_matrix": flops,
        "flops_per_device": assignment.worked * flops,
        "temp_bytes": _temp_bytes(assignment, matrix_bytes),
    }


def _balance(load: np.ndarray) -> dict:
    return {"max": load.max().item(), "mean": load.mean().item()}


def muon_assignments(config: Config, sizes: Mapping[str, int]) -> list[tuple[str, Weight, Assignment]]:
    """(name, declaration, assignment) of each leaf that the config's chain gives to Muon on a mesh of these sizes.

    Raises UserError for a chain that is not there or fails.
    """
    weights = declarations(config.model)
    assignments = make_assignments(weights, sizes)
    pairs = jax.tree.leaves_with_path(map_weights(lambda w, own: (w, own), weights, assignments),
                                      is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], Weight))  # fmt: skip
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), *pair) for path, pair in pairs]
    muon = muon_parameters(config)
    return [(name, weight, own) for name, weight, own in named if name in muon and own is not None]


def describe_assignments(config: Config) -> dict:
    """JSON values: each Muon leaf's assignment, then all together. Of one device, the busiest where they differ.

    FLOPs are Newton-Schulz's in its plain form; bytes are moved by all-to-all, once in and once out. Without leaves,
    and all zero, for a chain without Muon.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    leaves = muon_assignments(config, sizes)
    assignments = [assignment for _, _, assignment in leaves]
    entries = [_entry(f"params.{name}", weight, assignment, config) for name, weight, assignment in leaves]
    return {
        "leaves": entries,
        "matrices_per_device": _balance(load_per_device(assignments, [1] * len(assignments), sizes)),
        "flops_per_device": _balance(load_per_device(assignments, [e["flops_per_matrix"] for e in entries], sizes)),
        "bytes_moved_each_way": sum(e["bytes_moved_each_way"] for e in entries),
        "temp_bytes": max((e["temp_bytes"] for e in entries), default=0),  # one leaf is worked on after the other
    }


def assignment_lines(found: dict) -> list[str]:
    """`describe_assignments` as text: a line per leaf, then the sums; nothing for a chain without Muon."""
    if not found["leaves"]:
        return []
    table = [
        ("Newton-Schulz of", "matrix", "matrices", "slots", "padding", "copies", "bytes each way", "FLOP", "temp bytes")
    ]
    for leaf in found["leaves"]:
        numbers = (leaf[key] for key in ("bytes_moved_each_way", "flops_per_device", "temp_bytes"))
        moved, flops, temp = numbers
        table.append(
            (
                leaf["name"],
                " x ".join(map(str, leaf["matrix"])),
                f"{leaf['matrices']:,}",
                f"{leaf['slots_per_device']:,}",
                f"{leaf['padding']:.1%}",
                str(leaf["copies"]),
                f"{moved:,}",
                f"{flops:.3g}",
                f"{temp:,}",
            )
        )
    matrices, flops = found["matrices_per_device"], found["flops_per_device"]
    return [
        *aligned(table),
        f"per device: {matrices['max']:.0f} matrices at most, {matrices['mean']:.1f} on average; "
        f"{flops['max']:.3g} FLOP at most, {flops['max'] / (flops['mean'] or 1):.2f} times the average",
        f"            {found['bytes_moved_each_way']:,} bytes moved in, and as many out; "
        f"about {found['temp_bytes']:,} bytes of temporary memory",
        "",
    ]
