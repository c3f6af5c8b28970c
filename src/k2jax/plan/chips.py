"""Facts about accelerators, of one device as jax counts them, and how fast a mesh of them can communicate.

Times are ideal: all links of an axis busy all the time, nothing else on them.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from k2jax.errors import UserError
from k2jax.sharding.device_order import domain_of


class Chip(NamedTuple):
    """Peaks of one device. Bandwidths in bytes per second, links in one direction."""

    flops: float  # dense bf16 matmuls, FLOP per second
    hbm: float
    link: float  # TPU: one ICI link, of which a chip has two per dim of its torus. GPU: all of NVLink together
    network: float = 0.0  # GPU: its network card; 0 for TPUs, whose slices are planned one at a time
    wraps: int = 0  # TPU: a dim of the torus closes to a ring where it is a multiple of so many chips


# By jax's name of the kind, a GPU's by its beginning. TPU: Google Cloud's pages of each generation (peak, HBM); one-way
# bandwidth of a link from the table of "How to Scale Your Model" (jax-ml.github.io/scaling-book, part 2); rings: v4 and
# v5p by cubes of 4 x 4 x 4 chips, v5e and v6e by the pod's full 16. A TPU7x chip is two devices: half of its figures,
# links too. GPU: NVIDIA's data sheets of H100 SXM, H200 SXM and GB200 NVL72, dense; NVLink 4 and 5: 900 and 1,800 GB/s
# both ways; a card of 400 Gb/s for each GPU, as in DGX H100 and GB200 NVL72.
CHIPS = {
    "TPU v4": Chip(275e12, 1.228e12, 4.5e10, wraps=4),
    "TPU v5 lite": Chip(197e12, 0.819e12, 4.5e10, wraps=16),
    "TPU v5": Chip(459e12, 2.765e12, 9e10, wraps=4),
    "TPU v6 lite": Chip(918e12, 1.64e12, 9e10, wraps=16),
    "TPU7x": Chip(2307e12 / 2, 7.38e12 / 2, 9e10 / 2, wraps=4),
    "NVIDIA H100": Chip(989e12, 3.35e12, 450e9, 50e9),
    "NVIDIA H200": Chip(989e12, 4.8e12, 450e9, 50e9),
    "NVIDIA GB200": Chip(2500e12, 8e12, 900e9, 50e9),
}


def _is_named(kind: str, name: str) -> bool:
    return kind == name or (name.startswith("NVIDIA") and kind.startswith(name))


def is_known(kind: str) -> bool:
    """True for a device kind with figures."""
    return any(_is_named(kind, name) for name in CHIPS)


def chip_of(kind: str) -> Chip:
    """Raises UserError for a kind that is not in the table."""
    for name, chip in CHIPS.items():
        if _is_named(kind, name):
            return chip
    raise UserError(f"there are no figures of {kind!r}; there are of {', '.join(CHIPS)}")


class Ring(NamedTuple):
    """A dim of a torus, or a part of it, that a mesh axis lies along."""

    length: int
    is_closed: bool

    @property
    def links(self) -> int:
        """Links by which a chip at the worst place gets data along it: the end of a line has one."""
        return 2 if self.is_closed and self.length > 2 else 1

    @property
    def hops(self) -> float:
        """Of an even all-to-all: bytes over the busiest link, in the bytes that each device sends."""
        return self.length / (4 * self.links)


class Network(NamedTuple):
    """The links that join the devices of a mesh."""

    chip: Chip
    rings: Mapping[str, tuple[Ring, ...]]  # TPU: of each mesh axis
    outer: Mapping[str, int]  # GPU: of each mesh axis, how many NVLink domains it goes over
    sizes: Mapping[str, int]

    def seconds(self, kind: str, axes: tuple[str, ...], num_bytes: float) -> float:
        """Of a collective over `axes` whose largest array on a device has `num_bytes`; 0 over no axis."""
        group = math.prod(self.sizes[axis] for axis in axes)
        if group == 1:
            return 0.0
        if self.chip.network:
            return self._over_domains(kind, axes, num_bytes)
        if kind == "collective-permute":
            return num_bytes / self.chip.link
        rings = [ring for axis in axes for ring in self.rings[axis] if ring.length > 1]
        if not rings:  # devices of one chip, which talk through its memory
            return num_bytes / self.chip.hbm
        if kind in ("all-to-all", "ragged-all-to-all"):
            return max(ring.hops for ring in rings) * num_bytes / self.chip.link
        bandwidth = self.chip.link * sum(ring.links for ring in rings)
        return (1 + (kind == "all-reduce")) * num_bytes * (group - 1) / group / bandwidth

    def _over_domains(self, kind: str, axes: tuple[str, ...], num_bytes: float) -> float:
        """Inside NVLink domains and between them at the same time; the slower of both."""
        outer = math.prod(self.outer[axis] for axis in axes)
        inner = math.prod(self.sizes[axis] for axis in axes) // outer
        if kind == "collective-permute":
            return num_bytes / (self.chip.network if outer > 1 else self.chip.link)
        if kind in ("all-to-all", "ragged-all-to-all"):
            crossing, staying = (outer - 1) / outer, (inner - 1) / inner / outer
        else:  # what crosses is shared out among the group's devices of a domain, then passed on inside
            twice = 1 + (kind == "all-reduce")
            crossing, staying = twice * (outer - 1) / outer / inner, twice * (inner - 1) / inner
        return num_bytes * max(crossing / self.chip.network, staying / self.chip.link)


def _rings(mesh: jax.sharding.Mesh, dim: int, chip: Chip) -> tuple[Ring, ...]:
    """Of the axis that is the mesh's `dim`: the coordinates that change along it, and how many values each takes."""
    first = mesh.devices[tuple(slice(None) if d == dim else 0 for d in range(mesh.devices.ndim))]
    values = [{device.coords[at] for device in first} for at in range(len(first[0].coords))]
    whole = [len({device.coords[at] for device in mesh.devices.flat}) for at in range(len(values))]
    if first.size % math.prod(map(len, values)):  # neighbours that are none in the torus, as in slices of 8 chips
        return (Ring(first.size, False),)
    return tuple(
        Ring(len(own), len(own) == size and size % chip.wraps == 0)
        for own, size in zip(values, whole, strict=True)
        if len(own) > 1
    )


def network_of(mesh: jax.sharding.Mesh) -> Network:
    """The network of a mesh of TPUs of one slice, or of GPUs. Raises UserError for devices without figures."""
    first = mesh.devices.flat[0]
    chip = chip_of(first.device_kind)
    sizes = dict(mesh.shape)
    if chip.network:
        outer = {
            axis: len({domain_of(device) for device in mesh.devices.swapaxes(0, dim).reshape(sizes[axis], -1)[:, 0]})
            for dim, axis in enumerate(sizes)
        }
        return Network(chip, {}, outer, sizes)
    rings = {axis: _rings(mesh, dim, chip) for dim, axis in enumerate(sizes)}
    return Network(chip, rings, dict.fromkeys(sizes, 1), sizes)
