"""The smallest run with every feature on: what the tests of the whole trainer train, and the text for it."""

import os
from pathlib import Path

from k2jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, moe_intermediate_size=16,
            n_routed_experts=4, num_experts_per_tok=2, routed_scaling_factor=1.4, initializer_range=0.05,
        ),
        optim=OptimConfig(
            learning_rate=0.02, final_learning_rate=0.002, warmup_tokens=4 * 512, constant_until_tokens=12 * 512,
            cosine_until_tokens=20 * 512, qk_clip_tau=0.05,
        ),
        data=DataConfig(path="store", sequence_length=32, batch_sequences=16),
        train=TrainConfig(
            run_dir="run", num_steps=20, num_microbatches=2, compute_dtype="float32", eval_every=8, eval_sequences=16
        ),
        checkpoint=CheckpointConfig(save_every=4, keep_last=2),
    )  # fmt: skip


def make_store(folder: Path) -> None:
    """`store` in `folder`: the standard library's json package in bytes, half of its files held out."""
    from k2jax.data.text.prepare import prepare

    source = Path(os.__file__).parent / "json"
    prepare(str(source), str(folder / "store"), "byte", pattern="*.py", validation_fraction=0.5)
