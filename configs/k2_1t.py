"""Kimi K2, 1.03T parameters, over its 15.5T tokens: 1,024 TPU v5p chips or 1,024 GPUs of 80 GB.

    k2jax inspect configs/k2_1t.py
    k2jax plan configs/k2_1t.py --topology v5p:8x8x16     # does it fit? docs/planning.md

Published: the model, the schedule, the batch, tau (K2 report 2.1, 2.3, 2.5). What is ours: docs/optimizer.md.
Annealing (400B tokens at 4k, 60B at 32k) is on top of these tokens, and YaRN is for use beyond 32k.
"""

from k2jax.config import (
    Config,
    DataConfig,
    KernelsConfig,
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
            hidden_size=7168,
            num_hidden_layers=61,
            first_k_dense_replace=1,
            num_attention_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            n_routed_experts=384,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            rms_norm_eps=1e-6,
            rope=RopeConfig(
                rope_theta=50_000.0,
                factor=32.0,
                original_max_position_embeddings=4096,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        optim=OptimConfig(
            learning_rate=2e-4,
            final_learning_rate=2e-5,
            warmup_tokens=500 * 67_108_864,
            constant_until_tokens=10_000_000_000_000,
            cosine_until_tokens=15_500_000_000_000,
            weight_decay=0.1,
            qk_clip_tau=100.0,
        ),
        phases=PhasesConfig(
            start_tokens=(0, 15_500_000_000_000),
            rope=("plain", "plain"),
            router_bias_rate=(1e-3, 0.0),
            balance_alpha=(1e-4, 1e-4),
        ),
        data=DataConfig(path="data/k2", sequence_length=4096, batch_sequences=16_384),
        # All rows that could come are 48 times the balanced load. attention, "auto": on TPU tokamax's (docs/attention.md).
        kernels=KernelsConfig(expert_buffer=1.5),
        mesh=MeshConfig(fsdp=16, expert=64),  # the torus of 8 x 8 x 16 chips: experts over a plane, fsdp along the rest
        train=TrainConfig(run_dir="runs/k2_1t", num_steps=230_968, num_microbatches=4, eval_sequences=1024),
    )
