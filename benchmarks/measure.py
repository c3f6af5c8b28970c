"""Shared by the benchmarks: the machine's own matmul rate, memory, and lines that say whether a bound holds."""

import resource
import threading
import time
from pathlib import Path

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


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """`more`: the most bytes in memory inside a block, looked at every 2 ms, beyond those before it."""

    def __enter__(self):
        self._before = self._most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, resident())

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    @property
    def more(self) -> int:
        return self._most - self._before


def report(name: str, figure: str, bound: str = "", holds: bool = True) -> bool:
    """Print `pass|FAIL|    name: figure (bound)`, blank where there is no bound; gives back whether it holds."""
    verdict = ("pass" if holds else "FAIL") if bound else "    "
    print(f"{verdict}  {name}: {figure}{f' ({bound})' if bound else ''}", flush=True)
    return holds
