"""Shared by the checks at the start: sizes, and arrays compared with a reference."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from k2jax.config import MeshConfig
from k2jax.sharding.mesh import make_mesh

HIDDEN, WIDTH = 256, 128  # as small as the accelerators' kernels take
TOKENS, FEWEST = 128, 8  # of one device, the fewer the more devices there are
ALL_TOKENS = 16_384  # about; the reference works on all of them on one device


class Difference(NamedTuple):
    """One array of the chosen path beside the reference's."""

    name: str
    error: float  # largest over all entries, in units of the reference's largest; inf where it is not finite


class CheckResult(NamedTuple):
    """One check: the chosen implementation beside a reference."""

    chosen: str  # "exchange ring, grouped matmul ragged_dot"
    differences: list[Difference]
    remedy: str  # what a user may set instead


def difference(name: str, got, want) -> Difference:
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)
    return Difference(name, float(error) if np.isfinite(error) else math.inf)


def num_rows(mesh: jax.sharding.Mesh) -> int:
    """Sequences, one to each group of devices that have different ones."""
    return math.prod(mesh.shape[axis] for axis in ("replica", "fsdp", "expert"))


def on_one_device(reference: Callable, *arguments):
    """reference(*arguments) as NumPy arrays, by one device of this process and with matmuls in full."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])), jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(reference)(*arguments))
