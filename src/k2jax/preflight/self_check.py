"""Before a run begins: what it chose for its heavy work, on its own devices, against plain dense algebra.

A wrong answer from a collective or a kernel costs no error and no time, only the model. So on the actual mesh, with the
run's mesh axes, experts, choices and head dims but otherwise narrow, every part computes its outputs and all its
gradients, and a reference does so without exchange, sorting, chunks or kernels.
"""

import time
from collections.abc import Callable

import jax

from k2jax.config import Config
from k2jax.errors import RunFailed
from k2jax.preflight.attention import check_attention
from k2jax.preflight.compare import CheckResult
from k2jax.preflight.experts import check_experts
from k2jax.preflight.loss import check_loss

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # largest error over the reference's largest entry
# Each compares one of the run's choices with plain algebra; None where the run has no such part.
PARTS: list[Callable[[Config, jax.sharding.Mesh], CheckResult | None]] = [check_experts, check_attention, check_loss]


def is_on(config: Config) -> bool:
    """True if a run checks itself: "auto" does with several processes, whose network takes part."""
    return config.train.self_check == "on" or (config.train.self_check == "auto" and jax.process_count() > 1)


def self_check(config: Config, mesh: jax.sharding.Mesh) -> str:
    """One line that says what was checked, how close it was and what it cost. With `mesh` set.

    Raises RunFailed if an output or a gradient is further from the reference than rounding takes it.
    """
    started, tolerance = time.monotonic(), TOLERANCE[config.train.compute_dtype]
    parts = [part for check in PARTS if (part := check(config, mesh)) is not None]
    for part in parts:
        worst = max(part.differences, key=lambda d: d.error)
        if not worst.error <= tolerance:
            wrong = ", ".join(d.name for d in part.differences if not d.error <= tolerance)
            raise RunFailed(
                f"self-check: {part.chosen}: wrong on this mesh: {wrong}; the largest error is that of the "
                f"{worst.name}, {worst.error:.2g} of its largest entry, where {config.train.compute_dtype} allows "
                f"{tolerance:g}; {part.remedy}, or pass over the check with train.self_check = 'off'"
            )
    passed = "; ".join(f"{p.chosen}: within {max(d.error for d in p.differences):.1g}" for p in parts)
    return f"self-check: {passed} (allowed {tolerance:g}); {time.monotonic() - started:.1f} s"
