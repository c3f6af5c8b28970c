"""From a step's arrays to the record that metrics.jsonl, TensorBoard and the display show."""

import math
from pathlib import Path

import numpy as np

from k2jax.config import Config
from k2jax.errors import RunFailed
from k2jax.runs.mirror import run_folder, shown
from k2jax.train.guard import skip_reasons
from k2jax.train.step import Metrics

WALL_CLOCK = ("seconds", "tokens_per_second", "matmul_share")  # the only fields that a repeated run need not reproduce


def _number(value: np.ndarray | float) -> float | None:
    """For JSON, which has no NaN and no infinity: None is either; loss_hex tells which."""
    return float(value) if math.isfinite(value) else None


def make_record(step: int, metrics: Metrics, config: Config, seconds: float, matmul_seconds: float) -> dict:
    """Record of one step. `metrics` as NumPy arrays; `seconds`: wall clock since the step before.

    matmul_seconds: those of the step's model FLOPs, at the rate of matmuls on this machine.

    None stands for numbers that are not finite, and for what a skipped step did not do.
    """
    tau, skipped = config.optim.qk_clip_tau, bool(metrics.skipped_in_a_row)
    clipped = np.argwhere(metrics.report.max_logits > tau) if tau is not None and not skipped else []
    values = float(metrics.loss), float(metrics.grad_norm), float(metrics.report.max_logits.max())
    reasons = skip_reasons(config.guard, *values, tuple(metrics.zscores.tolist())) if skipped else []
    load = metrics.report.expert_load
    over_mean = load.max(-1) / load.mean(-1) if load.size else np.zeros(0)
    low, high = metrics.router_bias if load.size else (0.0, 0.0)
    lost = {
        f"lost_updates_{group}_{dtype}": None if skipped else float(share)
        for dtype, groups in metrics.lost_updates.items()
        for group, share in groups.items()
    }
    return {
        "step": step,
        "tokens": (step + 1) * config.batch_tokens,
        "loss": _number(metrics.loss),
        "loss_hex": float(metrics.loss).hex(),
        "grad_norm": _number(metrics.grad_norm),
        "param_norm": _number(metrics.param_norm),
        "learning_rate": float(metrics.learning_rate),
        "max_logit": _number(metrics.report.max_logits.max()),
        "max_logit_by_layer": [_number(layer.max()) for layer in metrics.report.max_logits],
        "heads_clipped": len(clipped),
        "clipped_heads": [f"L{layer}H{head}" for layer, head in clipped],
        "balance_loss": _number(metrics.report.balance_loss.mean()) if load.size else None,
        "expert_load_max_over_mean": float(over_mean.max()) if load.size else None,
        "expert_load_max_over_mean_by_layer": [float(layer) for layer in over_mean],
        "router_bias_min": float(low),
        "router_bias_max": float(high),
        "rows_dropped": int(metrics.report.rows_dropped.sum(dtype=np.int64)),
        "skipped": skipped,
        "skip_reasons": reasons,
        "skipped_in_a_row": int(metrics.skipped_in_a_row),
        "skipped_so_far": int(metrics.skipped),
        **lost,
        "seconds": seconds,
        "tokens_per_second": config.batch_tokens / seconds,
        "matmul_share": matmul_seconds / seconds,
    }


def check_health(record: dict, config: Config) -> None:
    """Raise RunFailed if new parameters are not numbers, or too many steps in a row were skipped."""
    folder = shown(run_folder(config.train.run_dir).checkpoints)
    end = f"the newest good state is in {folder}, and the same command continues from there"
    if record["param_norm"] is None:
        raise RunFailed(
            f"step {record['step']}: its gradient is finite, but the parameters after it are not; they are not saved, "
            f"{end} to the same step: begin a new train.run_dir with another optimizer or optim.learning_rate"
        )
    if record["skipped_in_a_row"] >= config.guard.max_skips:
        raise RunFailed(
            f"step {record['step']}: {record['skipped_in_a_row']} steps in a row were skipped (here "
            f"{'; '.join(record['skip_reasons'])}), and guard.max_skips = {config.guard.max_skips}; {end} to the "
            "same steps: look at the data (k2jax audit RUN --step STEP) and leave it out by data.skip_steps, after k2jax "
            "rewind if a checkpoint is past it; or give other guard.* values, or begin a new train.run_dir with another "
            "optim.learning_rate"
        )


class TensorBoard:
    """Scalars of the records, under tb/."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter  # 0.3 s to import

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()
