"""Records of the steps: held until the next step has begun, so that the device never waits for the host."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from k2jax.config import Config
from k2jax.runs.records import MetricsFile
from k2jax.train.display import Display
from k2jax.train.metrics import TensorBoard, check_health, make_record
from k2jax.train.step import Metrics


class Recorder:
    """Writes each step's record to metrics.jsonl, TensorBoard and the display, one step late.

    A step's seconds are what has passed since the record before, less what was `untimed`.
    """

    def __init__(self, config: Config, first_step: int, display: Display):
        folder = Path(config.train.run_dir)
        self._config, self._display, self._held = config, display, None
        self._file = MetricsFile(folder / "metrics.jsonl", first_step)
        self._board = TensorBoard(folder / "tb", first_step)
        self.start_clock()

    def start_clock(self) -> None:
        """What came before belongs to no step."""
        self._last_time = time.monotonic()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What is no part of a step's time."""
        started = time.monotonic()
        yield
        self._last_time += time.monotonic() - started

    def hold(self, step: int, metrics: Metrics, extra: dict) -> None:
        """Keep what step `step` gave, arrays that may still be computed, until `write`."""
        self._held = step, metrics, extra

    def write(self) -> None:
        """Write what is held, if anything is. RunFailed where it shows that the run cannot go on."""
        if self._held is None:
            return
        step, metrics, extra = self._held
        metrics = jax.device_get(metrics)
        now = time.monotonic()
        record = make_record(step, metrics, self._config, now - self._last_time) | extra
        self._held, self._last_time = None, now
        self._file.write(record)
        self._board.write(record)
        self._display.step(record)
        check_health(record, self._config)

    def sync(self) -> None:
        """Everything given so far is on the disk when this returns."""
        self.write()
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        self._board.close()
