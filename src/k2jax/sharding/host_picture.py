"""The mesh over hosts as a small picture: the part of each axis that a host or slice has, and the axes that cross."""

from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np

from k2jax.sharding.device_order import crossed_axes, domain_noun, domain_of
from k2jax.sharding.names import AXES

MAX_ROWS = 8  # of hosts or slices; more are left out in the middle


def _process_of(device) -> int:
    return device.process_index


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"; of more than three ranges the first, the last and how many numbers they are."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    ranges = [f"{start}-{end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True)]
    return ",".join(ranges) if len(ranges) <= 3 else f"{ranges[0]}..{ranges[-1]} ({len(numbers)} of them)"


def _rows(mesh: jax.sharding.Mesh, noun: str, number_of: Callable) -> list[str]:
    """A line for each host or slice: its coordinates along every axis longer than 1."""
    coordinates = defaultdict(list)
    for at, device in np.ndenumerate(mesh.devices):
        coordinates[number_of(device)].append(at)
    owners = sorted(coordinates)
    left_out = max(len(owners) - MAX_ROWS, 0)
    half = MAX_ROWS // 2
    shown = owners[:half] + owners[-half:] if left_out else owners
    width = len(f"{noun} {owners[-1]}")
    lines = []
    for owner in shown:
        parts = [
            f"{axis} {_ranges({at[dim] for at in coordinates[owner]})}"
            for dim, axis in enumerate(AXES)
            if mesh.shape[axis] > 1
        ]
        lines.append(f"{f'{noun} {owner}':<{width}}  " + "  ".join(parts))
    return lines[:half] + [f"... {left_out} more"] + lines[half:] if left_out else lines


def picture_hosts(mesh: jax.sharding.Mesh) -> list[str]:
    """At most eleven lines: a row for each slice, or process if all are in one; then the axes that cross.

    Nothing for one process. A process is a host, unless several were started on one.
    """
    devices = mesh.devices.ravel().tolist()
    num_domains, num_processes = (len({of(device) for device in devices}) for of in (domain_of, _process_of))
    if num_domains == num_processes == 1:
        return []

    def crossing(of: Callable) -> str:
        return ", ".join(f"{axis} {mesh.shape[axis]}" for axis in crossed_axes(mesh.devices, of)) or "nothing"

    if num_domains == 1:
        return [*_rows(mesh, "process", _process_of), f"crosses processes: {crossing(_process_of)}"]
    noun = domain_noun(devices)
    lines = [*_rows(mesh, noun, domain_of), f"crosses the slow network between {noun}s: {crossing(domain_of)}"]
    return [*lines, f"crosses processes: {crossing(_process_of)}"] if num_processes > num_domains else lines
