"""Times of collectives on a torus and behind NVLink, against bytes routed link by link."""

import itertools
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from k2jax.errors import UserError
from k2jax.plan.chips import CHIPS, Chip, Network, Ring, chip_of, network_of
from k2jax.sharding.names import AXES

LINK = 1e9


def torus(*rings):
    """An axis along each ring of so many chips, and their product over all."""
    sizes = {f"axis{i}": ring.length for i, ring in enumerate(rings)}
    of_axis = {f"axis{i}": (ring,) for i, ring in enumerate(rings)}
    return Network(Chip(1e12, 1e12, LINK), of_axis, dict.fromkeys(sizes, 1), sizes)


def steps(ring, start, end):
    """(bytes' share, [(from, to)]) of the shortest ways along a ring or a line; both ways where they are as long."""
    ahead = [((start + i) % ring.length, (start + i + 1) % ring.length) for i in range((end - start) % ring.length)]
    back = [((start - i) % ring.length, (start - i - 1) % ring.length) for i in range((start - end) % ring.length)]
    if not ring.is_closed:
        return [(1.0, ahead if end > start else back)]
    if len(ahead) == len(back):
        return [(0.5, ahead), (0.5, back)]
    return [(1.0, min(ahead, back, key=len))]


@pytest.mark.parametrize(
    "rings",
    [
        (Ring(8, True),), (Ring(8, True), Ring(8, True)), (Ring(4, True), Ring(8, True)), (Ring(8, False),),
        (Ring(2, False),),
    ],
)  # fmt: skip
def test_all_to_all(rings):
    """Every chip sends as much to every chip, first along one dim, then along the next: the busiest link decides."""
    load, chips = Counter(), list(itertools.product(*(range(ring.length) for ring in rings)))
    for source, target in itertools.product(chips, chips):
        at = list(source)
        for dim, ring in enumerate(rings):
            for share, way in steps(ring, at[dim], target[dim]):
                for hop in way:
                    load[dim, tuple(at[:dim] + at[dim + 1 :]), hop] += share / len(chips)
            at[dim] = target[dim]
    network = torus(*rings)
    assert network.seconds("ragged-all-to-all", tuple(network.sizes), LINK) == pytest.approx(max(load.values()))


@pytest.mark.parametrize(
    ("ring", "expected"), [(Ring(8, True), 7 / 16), (Ring(8, False), 7 / 8), (Ring(2, False), 1 / 2)]
)
def test_gathers(ring, expected):
    """A chip of a ring takes what it lacks by two links; a chip at the end of a line by its only one."""
    network = torus(ring)
    seconds = [network.seconds(kind, ("axis0",), LINK) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    assert seconds == pytest.approx([expected, expected, 2 * expected])
    assert network.seconds("all-gather", (), LINK) == 0


def test_gpus():
    """16 hosts of 8 GPUs, one axis inside the host, one across: each network card takes its GPU's share."""
    chip = CHIPS["NVIDIA H100"]
    network = Network(chip, {}, {"fsdp": 16, "expert": 1}, {"fsdp": 16, "expert": 8})
    one = 2**30
    assert network.seconds("all-gather", ("expert",), one) == pytest.approx(one * 7 / 8 / 450e9)
    assert network.seconds("all-gather", ("fsdp",), one) == pytest.approx(one * 15 / 16 / 50e9)
    assert network.seconds("all-reduce", ("fsdp", "expert"), one) == pytest.approx(2 * one * 15 / 16 / 8 / 50e9)
    assert network.seconds("all-to-all", ("fsdp", "expert"), one) == pytest.approx(one * 15 / 16 / 50e9)


def mesh_of_chips(kind, shape, axes, per_chip=1):
    """A stand-in for a mesh of a topology: chips of a torus in the order of their coordinates."""
    places = [at for at in np.ndindex(*shape) for _ in range(per_chip)]
    devices = [SimpleNamespace(device_kind=kind, coords=at, platform="tpu") for at in places]
    sizes = [axes.get(axis, 1) for axis in AXES]
    array = np.empty(len(devices), object)
    array[:] = devices
    return SimpleNamespace(devices=array.reshape(sizes), shape=dict(zip(AXES, sizes, strict=True)))


def test_axes_along_the_torus():
    network = network_of(mesh_of_chips("TPU v5", (16, 8, 8), {"fsdp": 16, "expert": 64}))
    assert network.rings["fsdp"] == (Ring(16, True),) and network.rings["expert"] == (Ring(8, True), Ring(8, True))
    # 1.75 GiB of rows over a plane of 8 x 8: 20.88 ms, as its bytes over 90 GB/s
    assert network.seconds("ragged-all-to-all", ("expert",), 131_072 * 14_336) == pytest.approx(131_072 * 14_336 / 9e10)
    network = network_of(mesh_of_chips("TPU v6 lite", (8, 16), {"fsdp": 8, "expert": 16}))
    assert (network.rings["fsdp"], network.rings["expert"]) == ((Ring(8, False),), (Ring(16, True),))


def test_two_devices_of_a_chip():
    """They talk through its memory."""
    network = network_of(mesh_of_chips("TPU7x", (4, 4, 4), {"fsdp": 64, "tensor": 2}, per_chip=2))
    assert network.rings["tensor"] == () and network.seconds("all-gather", ("tensor",), 3.69e12) == pytest.approx(1)


def test_unknown_kinds():
    assert chip_of("NVIDIA H100 80GB HBM3") == CHIPS["NVIDIA H100"]
    for kind in ("cpu", "TPU v5x", "TPU v"):
        with pytest.raises(UserError, match=f"there are no figures of '{kind}'; there are of TPU v4, "):
            chip_of(kind)
    with pytest.raises(UserError, match="no figures of 'cpu'"):
        network_of(jax.make_mesh((1,), ("fsdp",)))
