"""Moonlight-16B-A3B: plain queries, two shared experts, no YaRN; 64 chips or GPUs of 80 GB.

    k2jax inspect configs/moonlight_16b.py

Published: the model, learning rate, batch and phases (Moonlight 3.3, appendix C). Its batch is 2,048 sequences for the
first 200B tokens and the rate rises again in the cooldown; here both stay on one line.
"""

from k2jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PhasesConfig,
    RopeConfig,
    TrainConfig,
)


def config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=163_840,
            hidden_size=2048,
            num_hidden_layers=27,
            first_k_dense_replace=1,
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=11_264,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope=RopeConfig(rope_theta=50_000.0, factor=None),
            initializer_range=0.02,
        ),
        optim=OptimConfig(
            learning_rate=4.2e-4,
            final_learning_rate=4.2e-5,
            warmup_tokens=33_000_000_000,
            constant_until_tokens=33_000_000_000,
            cosine_until_tokens=5_200_000_000_000,
            qk_clip_tau=100.0,
        ),
        phases=PhasesConfig(
            start_tokens=(0, 5_200_000_000_000),
            rope=("plain", "plain"),
            router_bias_rate=(1e-3, 0.0),
            balance_alpha=(1e-4, 1e-4),
        ),
        data=DataConfig(path="data/moonlight", sequence_length=8192, batch_sequences=4096),
        mesh=MeshConfig(fsdp=8, expert=8),
        train=TrainConfig(run_dir="runs/moonlight_16b", num_steps=169_873, num_microbatches=16),
    )
