"""Records of the steps: held until the next step has begun, so that the device never waits for the host."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax

from k2jax.config import Config
from k2jax.train.metrics import check_health, make_record
from k2jax.train.outputs import Outputs
from k2jax.train.step import Metrics


class Recorder:
    """Hands each step's record to the outputs, one step late.

    The seconds of a step run from the record before it to its own, without what was `untimed`.
    """

    def __init__(self, config: Config, outputs: Outputs):
        self._config, self._outputs, self._held = config, outputs, None
        self.start_clock(math.nan)

    def start_clock(self, matmul_seconds: float) -> None:
        """Start the step timer. matmul_seconds: of a step, if all of it were matmuls at the machine's rate."""
        self._matmul_seconds, self._last_time = matmul_seconds, time.monotonic()

    @contextlib.contextmanager
    def untimed(self, kind: str) -> Iterator[None]:
        """Exclude this block from the step time; in the account of time it is of this kind."""
        started = time.monotonic()
        with self._outputs.time.spent_on(kind):
            yield
        self._last_time += time.monotonic() - started

    def hold(self, step: int, metrics: Metrics, extra: dict) -> None:
        """Keep the metrics of step `step`, arrays that may still be computing, until `write`."""
        self._held = step, metrics, extra

    def write(self) -> None:
        """Write the held record, if there is one. Raises RunFailed if it shows that the run cannot go on."""
        if self._held is None:
            return
        step, metrics, extra = self._held
        metrics = jax.device_get(metrics)
        now = time.monotonic()
        record = make_record(step, metrics, self._config, now - self._last_time, self._matmul_seconds) | extra
        self._held, self._last_time = None, now
        self._outputs.record(record)
        check_health(record, self._config)

    def sync(self) -> None:
        """Return when the records of all steps so far are on the disk."""
        self.write()
        self._outputs.sync()
