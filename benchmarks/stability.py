"""Effect of large attention logits on a small MoE of the K2 family on real text, and of QK-Clip on them.

    make data && python benchmarks/stability.py --out runs/stability

trains every variant below with three seeds, one after the other, at a rate where the largest logit of plain Muon keeps
growing; writes figures.json and stability.png to the folder, and prints a table. Runs that are done are not done again.
"""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from k2jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, PhasesConfig, TrainConfig
from k2jax.errors import RunFailed
from k2jax.launch.distributed import use_cpu_devices

BATCH_TOKENS, RATE, CAP = 16 * 128, 3e-2, 30.0
ADAMW = {"optim.optimizer": f"{Path(__file__).with_name('chains.py')}:adamw"}
SLOW = {"optim.learning_rate": RATE / 10, "optim.final_learning_rate": RATE / 10}
VARIANTS = {
    "AdamW": ADAMW,
    "AdamW, rate / 10": ADAMW | SLOW,
    "Muon": {},
    "Muon, soft cap 30": {},
    "MuonClip, tau 100": {"optim.qk_clip_tau": 100.0},
    "MuonClip, tau 30": {"optim.qk_clip_tau": 30.0},
    "MuonClip, tau 10": {"optim.qk_clip_tau": 10.0},
}
SPIKE_WINDOW, SPIKE_ZSCORE = 64, 5.0


def config(data: str, num_steps: int) -> Config:
    """Plain Muon at a constant rate; little decay, so that decay does not hold the weights before clipping must."""
    tokens = num_steps * BATCH_TOKENS
    return Config(
        model=ModelConfig(
            vocab_size=258,
            hidden_size=64,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            intermediate_size=256,
            moe_intermediate_size=64,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            routed_scaling_factor=1.45,
            initializer_range=0.08,
        ),
        optim=OptimConfig(
            learning_rate=RATE,
            final_learning_rate=RATE,
            warmup_tokens=20 * BATCH_TOKENS,
            constant_until_tokens=tokens,
            cosine_until_tokens=tokens,
            weight_decay=0.01,
            qk_clip_tau=None,
        ),
        phases=PhasesConfig(start_tokens=(0,), rope=("plain",), router_bias_rate=(1e-3,), balance_alpha=(1e-4,)),
        data=DataConfig(path=data, sequence_length=128, batch_sequences=16),
        train=TrainConfig(
            num_steps=num_steps, compute_dtype="float32", remat="none", log_every=num_steps, eval_sequences=512
        ),
        checkpoint=CheckpointConfig(save_every=num_steps, keep_last=1),
    )


def soft_capped(q_BHSK, sources, weights, make, q_at, k_at, scale, kernels):
    """In attention's place: logits go through cap * tanh(logit / cap) (Gemma 2 report, 2); maxima before that."""
    import jax
    import jax.numpy as jnp

    k_BHZK, v_BHZU = make(*sources, *weights)
    logit_BHSZ = jnp.einsum("BHSK,BHZK->BHSZ", q_BHSK, k_BHZK) * scale
    visible_BSZ = q_at.segment[:, :, None] == k_at.segment[:, None]
    visible_B1SZ = (visible_BSZ & (q_at.index[:, :, None] >= k_at.index[:, None]))[:, None]
    max_H = jnp.where(visible_B1SZ, jax.lax.stop_gradient(logit_BHSZ), -jnp.inf).max((0, 2, 3))
    capped_BHSZ = jnp.where(visible_B1SZ, CAP * jnp.tanh(logit_BHSZ / CAP), -jnp.inf)
    return jnp.einsum("BHSZ,BHZU->BHSU", jax.nn.softmax(capped_BHSZ), v_BHZU), max_H


def train(config: Config, soft_cap: bool) -> list[dict]:
    """The records of a run, which is made or finished first where it is not done."""
    from k2jax.runs.records import read_records
    from k2jax.train.loop import run

    folder = Path(config.train.run_dir)

    def records():
        return read_records(folder / "metrics.jsonl")

    if (folder / "metrics.jsonl").exists() and len(records()) == config.train.num_steps:
        return records()
    folder.parent.mkdir(parents=True, exist_ok=True)
    patch = mock.patch("k2jax.model.mla.attention", soft_capped) if soft_cap else contextlib.nullcontext()
    with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), patch:
        try:
            if run(config).signal is not None:
                sys.exit("stopped; the same command goes on")
        except RunFailed as failed:  # an outcome like any other: its records go up to where it ended
            print(failed)
    return records()


def count_spikes(losses: np.ndarray) -> int:
    """Steps whose loss is SPIKE_ZSCORE deviations over the mean of the SPIKE_WINDOW before: the guard's rule."""
    past = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_WINDOW)[:-1]
    return int((losses[SPIKE_WINDOW:] > past.mean(1) + SPIKE_ZSCORE * past.std(1)).sum())


def figures_of(config: Config, records: list[dict]) -> dict:
    """The figures of one run. Logits at a quarter of the run and so on are means over the ten steps before."""

    def column(name):
        return np.array([math.inf if r[name] is None else r[name] for r in records])

    losses, logits = column("loss"), column("max_logit")
    heads = config.model.num_hidden_layers * config.model.num_attention_heads
    steps = config.train.num_steps
    return {
        "steps": len(records),
        "validation_bits_per_byte": records[-1].get("validation_bits_per_byte", math.nan),
        "final_training_loss": float(losses[-50:].mean()),
        "max_logit_by_quarter": [float(logits[q * steps // 4 - 10 : q * steps // 4].mean()) for q in (1, 2, 3, 4)],
        "largest_logit": float(logits.max()),
        "heads_clipped_per_step": float(column("heads_clipped").mean() / heads),
        "heads_ever_clipped": len({head for r in records for head in r["clipped_heads"]}) / heads,
        "skipped_steps": records[-1]["skipped_so_far"],
        "loss_spikes": count_spikes(losses),
    }


def summary(runs: list[dict]) -> dict:
    """{figure: mean, smallest and largest over the seeds}."""

    def of(values):
        return {
            "mean": np.mean(values, 0).tolist(),
            "min": np.min(values, 0).tolist(),
            "max": np.max(values, 0).tolist(),
        }

    return {name: of([run[name] for run in runs]) for name in runs[0]}


def table(summaries: dict[str, dict]) -> str:
    """Markdown: means over the seeds, ranges in brackets."""

    def ranged(figure, digits):
        return f"{figure['mean']:.{digits}f} ({figure['min']:.{digits}f} to {figure['max']:.{digits}f})"

    lines = [
        "| variant | validation, bits per byte | training loss, last 50 steps | max logit at 1/4, 1/2, 3/4, end | "
        "largest of all steps | heads clipped in a step | heads ever clipped | skipped steps | loss spikes |",
        "|" + "---|" * 9,
    ]
    for name, s in summaries.items():
        mean = {figure: values["mean"] for figure, values in s.items()}
        quarters = ", ".join(f"{x:.0f}" for x in mean["max_logit_by_quarter"])
        lines.append(
            f"| {name} | {ranged(s['validation_bits_per_byte'], 3)} | {ranged(s['final_training_loss'], 3)} "
            f"| {quarters} | {ranged(s['largest_logit'], 0)} | {mean['heads_clipped_per_step']:.1%} "
            f"| {mean['heads_ever_clipped']:.0%} | {mean['skipped_steps']:.1f} | {mean['loss_spikes']:.1f} |"
        )
    return "\n".join(lines)


def draw(runs: dict[str, list[list[dict]]], out: Path, smooth: int = 20) -> None:
    """Training loss (mean of `smooth` steps) and largest logit against tokens; a colour a variant, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, logit_axes) = pyplot.subplots(
        2, 1, figsize=(9, 9), sharex=True, height_ratios=(1, 1.2), constrained_layout=True
    )
    for index, (name, seeds) in enumerate(runs.items()):
        for seed, records in enumerate(seeds):
            tokens, losses, logits = np.array(
                [[r[n] for n in ("tokens", "loss", "max_logit")] for r in records], float
            ).T
            style = {"color": f"C{index}", "linewidth": 0.8, "label": name if seed == 0 else None}
            loss_axes.plot(tokens[smooth - 1 :], np.convolve(losses, np.ones(smooth) / smooth, "valid"), **style)
            logit_axes.plot(tokens, logits, **style)
    loss_axes.set_ylabel(f"training loss, nats per token, mean of {smooth} steps")
    logit_axes.set_ylabel("largest attention logit of the step, before any cap")
    logit_axes.set_xlabel("tokens")
    for axes in (loss_axes, logit_axes):
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    logit_axes.legend(loc="lower right", fontsize="small")
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for runs and results")
    parser.add_argument("--data", default="data/stdlib", help="token store of bytes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    use_cpu_devices(1)
    import jax

    out, base = Path(args.out), config(args.data, args.steps)
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))  # the seeds of a variant share one program
    runs = {name: [] for name in args.variants}
    figures = {name: [] for name in args.variants}
    for seed in range(args.seeds):
        for name in args.variants:
            own = {
                "train.run_dir": str(out / name.replace(", ", "-").replace(" / ", "-by-").replace(" ", "-") / f"{seed}")
            }
            changed = base.replace(VARIANTS[name] | own | {"train.seed": seed, "data.seed": seed})
            runs[name].append(train(changed, "soft cap" in name))
            figures[name].append(figures_of(changed, runs[name][-1]))
            print(f"{name}, seed {seed}: {json.dumps(figures[name][-1])}", flush=True)
    summaries = {name: summary(of_seeds) for name, of_seeds in figures.items()}
    written = {name: {"seeds": figures[name], "summary": summaries[name]} for name in args.variants}
    (out / "figures.json").write_text(json.dumps(written, indent=1) + "\n")
    draw(runs, out / "stability.png")
    print(table(summaries))


if __name__ == "__main__":
    main()
