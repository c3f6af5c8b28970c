"""Whole matrices dealt out to devices: an assignment for every leaf, all of them levelled over the mesh.

A leaf's group is the devices that hold parts of the same matrices. They work on `worked` whole ones each, but for the
last, which have what is left: fewer, and then none. Device `offset` of the group counts as its first.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from k2jax.optim.newton_schulz import newton_schulz_flops


class Assignment(NamedTuple):
    """One leaf's way to whole matrices, on every device alike."""

    spec: P  # the leaf at rest
    num_stack: int  # its leading dims, which count matrices
    axes: tuple[str, ...]  # that cut inside its matrices, in the mesh's order: they make the group
    cuts: tuple[tuple[str, ...], ...]  # the same axes by the dim of a matrix that they cut, outermost first
    group: int  # devices that share the held matrices out
    held: int  # matrices that a device has a part of
    copies: int  # devices that work on the same matrix, since nothing of the leaf is cut between them
    offset: int = 0  # the device of the group that has the first matrix; of use where some devices have none

    @property
    def worked(self) -> int:
        """Slots for matrices on each device, empty ones included."""
        return -(-self.held // self.group)

    @property
    def padding(self) -> float:
        """Share of the slots that hold no matrix."""
        return 1 - self.held / (self.worked * self.group)

    def per_device(self) -> np.ndarray:
        """Matrices that each device of the group works on: int [group]."""
        return np.roll(np.clip(self.held - self.worked * np.arange(self.group), 0, self.worked), self.offset)


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def make_assignment(shape: tuple[int, ...], num_stack: int, spec: P, sizes: Mapping[str, int]) -> Assignment:
    """The assignment of a leaf [stack..., matrix dims...] that lies as `spec` says on a mesh of these axis sizes."""
    cuts = [tuple(a for a in _axes(entry) if sizes[a] > 1) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    held = math.prod(size // math.prod(sizes[a] for a in cut) for size, cut in zip(shape, cuts[:num_stack]))
    inside = {a for cut in cuts[num_stack:] for a in cut}
    group = math.prod(sizes[a] for a in inside)
    copies = math.prod(sizes[a] for a in sizes if not any(a in cut for cut in cuts))
    axes = tuple(a for a in sizes if a in inside)
    return Assignment(spec, num_stack, axes, tuple(cuts[num_stack:]), group, held, copies)


def _on_mesh(
    assignment: Assignment, of_group: np.ndarray, names: tuple[str, ...], sizes: Mapping[str, int]
) -> np.ndarray:
    """Numbers per device of an assignment's group [group] as an array that broadcasts over the mesh's axes `names`."""
    return of_group.reshape([sizes[a] if a in assignment.axes else 1 for a in names])


def _offset(assignment: Assignment, load: np.ndarray, names: tuple[str, ...]) -> int:
    """The offset that minimises the peak load of the devices that get a matrix, then their total load."""
    # A group of 4 with loads [5, 0, 1, 7] and 2 matrices held: the windows, around the end too, are (5, 0), (0, 1),
    # (1, 7) and (7, 5); the second has the lowest peak, so devices 1 and 2 get the matrices.
    others = tuple(i for i, a in enumerate(names) if a not in assignment.axes)
    largest = load.max(others).reshape(-1)  # of the devices that work alike, as each of them has its own matrices
    around = np.concatenate([largest, largest[: assignment.held - 1]])
    windows = np.lib.stride_tricks.sliding_window_view(around, assignment.held)
    return int(np.lexsort((windows.sum(1), windows.max(1)))[0])


def load_per_device(assignments: list[Assignment], costs: list[float], sizes: Mapping[str, int]) -> np.ndarray:
    """Sum over leaves of the cost of each matrix that a device works on: [axis sizes...], in the order of `sizes`."""
    load = np.zeros(tuple(sizes.values()))
    for assignment, cost in zip(assignments, costs, strict=True):
        load += _on_mesh(assignment, assignment.per_device() * cost, tuple(sizes), sizes)
    return load


def level(assignments: list[Assignment], costs: list[float], sizes: Mapping[str, int]) -> list[Assignment]:
    """The assignments with offsets, so that the largest load is small; costs: of one matrix of each leaf.

    Leaves whose matrices fill their group load all devices (nearly) alike and stay; the others are laid one after the
    other, costly matrices first, where the devices have least to do. The same input gives the same offsets.
    """
    # Longest-processing-time-first scheduling: cheap leaves come last and fill the gaps that costly ones leave. Greedy,
    # since all combinations are too many; within about a tenth of the best wherever a test can search them all.
    few = [i for i, assignment in enumerate(assignments) if assignment.held < assignment.group]
    done, names = list(assignments), tuple(sizes)
    full = [i for i in range(len(assignments)) if i not in few]
    load = load_per_device([assignments[i] for i in full], [costs[i] for i in full], sizes)
    for i in sorted(few, key=lambda i: -costs[i]):  # a stable sort
        done[i] = assignments[i]._replace(offset=_offset(assignments[i], load, names))
        load += _on_mesh(done[i], done[i].per_device() * costs[i], names, sizes)
    return done


def matrix_flops(shape: tuple[int, ...], num_stack: int, num_inputs: int, steps: int) -> int:
    """FLOPs of Newton-Schulz on one matrix of a leaf [stack..., inputs..., outputs...]."""
    rest = shape[num_stack:]
    return newton_schulz_flops(math.prod(rest[:num_inputs]), math.prod(rest[num_inputs:]), steps)


def make_assignments(weights, sizes: Mapping[str, int]):
    """Assignments for a pytree of weight declarations on a mesh of these axis sizes; None for weights not Muon's.

    A declaration has group, shape, num_stack, num_inputs and spec(sizes), the layout at rest.
    """
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda x: hasattr(x, "group"))
    muon = [i for i, w in enumerate(leaves) if w.group == "muon"]
    assignments = [make_assignment(leaves[i].shape, leaves[i].num_stack, leaves[i].spec(sizes), sizes) for i in muon]
    costs = [matrix_flops(leaves[i].shape, leaves[i].num_stack, leaves[i].num_inputs, 1) for i in muon]  # relative
    found = dict(zip(muon, level(assignments, costs, sizes), strict=True))
    return tree.unflatten([found.get(i) for i in range(len(leaves))])
