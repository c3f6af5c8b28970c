"""Shared by the benchmarks: the machine's own matmul rate, and lines that say whether a bound holds."""

import time

import jax
import jax.numpy as jnp


def timed(function, *arguments) -> tuple[float, float]:
    """Seconds of wall clock and of CPU time until the results are there."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - wall, time.process_time() - cpu


def matmul_rate(rounds: int = 10) -> float:
    """FLOP per second of the fastest of `rounds` jitted float32 2048^3 `jnp.dot`."""
    square = jnp.ones((2048, 2048))
    dot = jax.jit(jnp.dot)
    timed(dot, square, square)
    return 2 * 2048**3 / min(timed(dot, square, square)[0] for _ in range(rounds))


def report(name: str, figure: str, bound: str = "", holds: bool = True) -> bool:
    """Print `pass|FAIL|    name: figure (bound)`, blank where there is no bound; gives back whether it holds."""
    verdict = ("pass" if holds else "FAIL") if bound else "    "
    print(f"{verdict}  {name}: {figure}{f' ({bound})' if bound else ''}", flush=True)
    return holds
