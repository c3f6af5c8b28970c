"""From a step's arrays to the record that metrics.jsonl, TensorBoard and the display show."""

import math
from pathlib import Path

import numpy as np

from k2jax.config import Config, RunFailed
from k2jax.train.step import Metrics

WALL_CLOCK = ("seconds", "tokens_per_second")  # the only fields that a repeated run need not reproduce


def make_record(step: int, metrics: Metrics, config: Config, seconds: float) -> dict:
    """Record of one step. `metrics` as NumPy arrays; `seconds`: wall clock since the step before."""
    tau = config.optim.qk_clip_tau
    clipped = np.argwhere(metrics.max_logits > tau) if tau is not None else []
    load, num_choices = metrics.expert_load, config.model.num_experts_per_tok
    over_mean = load.max(-1) / load.mean(-1) if load.size else np.zeros(0)
    low, high = metrics.router_bias if load.size else (0.0, 0.0)
    return {
        "step": step,
        "tokens": (step + 1) * config.batch_tokens,
        "loss": float(metrics.loss),
        "loss_hex": float(metrics.loss).hex(),
        "grad_norm": float(metrics.grad_norm),
        "param_norm": float(metrics.param_norm),
        "learning_rate": float(metrics.learning_rate),
        "max_logit": float(metrics.max_logits.max()),
        "max_logit_by_layer": [float(layer.max()) for layer in metrics.max_logits],
        "heads_clipped": len(clipped),
        "clipped_heads": [f"L{layer}H{head}" for layer, head in clipped],
        "balance_loss": float(metrics.balance_loss.mean()) if load.size else None,
        "expert_load_max_over_mean": float(over_mean.max()) if load.size else None,
        "expert_load_max_over_mean_by_layer": [float(layer) for layer in over_mean],
        "router_bias_min": float(low),
        "router_bias_max": float(high),
        "rows_dropped": len(load) * config.batch_tokens * num_choices - int(load.sum(dtype=np.int64)),
        "seconds": seconds,
        "tokens_per_second": config.batch_tokens / seconds,
    }


def check_finite(record: dict, run_dir: str) -> None:
    """Raise RunFailed where the step's loss, gradient or new parameters are not numbers."""
    bad = [name for name in ("loss", "grad_norm", "max_logit", "param_norm") if not math.isfinite(record[name])]
    if bad:
        values = ", ".join(f"{name} = {record[name]}" for name in bad)
        raise RunFailed(
            f"step {record['step']}: {values}; the state after it is not saved, the newest good one is in "
            f"{run_dir}/checkpoints. The same command would come to the same step: begin a new train.run_dir with "
            "another optim.learning_rate, or look at the data"
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
