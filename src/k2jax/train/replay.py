"""Steps that a restart does again: on the same mesh and software their losses come out again, bit for bit."""

import math

from k2jax.errors import RunFailed


class Replay:
    """The records that a resumed run drops, held against those of the same steps done again.

    dropped: of metrics.jsonl. bound: largest relative difference of the losses, None for any.
    """

    def __init__(self, dropped: list[dict], bound: float | None):
        self._losses = {record["step"]: float.fromhex(record["loss_hex"]) for record in dropped}
        self._bound, self._said = bound, False

    def compare(self, record: dict) -> str | None:
        """A sentence about a step done again, for the first of them and for each that differs; None for all others.

        Raises RunFailed if it differs by more than the bound: what was restored is not what was saved, or this machine
        computes something else.
        """
        before, now = self._losses.pop(record["step"], None), float.fromhex(record["loss_hex"])
        if before is None:
            return None
        same = before == now or (math.isnan(before) and math.isnan(now))
        if same:
            text = None if self._said else f"step {record['step']}, done again: the same loss as before, bit for bit"
        else:
            apart = abs(now / before - 1) if before and math.isfinite(before) and math.isfinite(now) else math.inf
            text = f"step {record['step']}, done again: its loss is {now!r}, before it was {before!r} ({apart:.1e} apart)"
            if self._bound is not None and apart > self._bound:
                rule = f"train.replay_bound = {self._bound:g}; look at the devices and at what else has changed since"
                raise RunFailed(f"{text}, and {rule}")
        self._said = True
        return text
