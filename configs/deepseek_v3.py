"""DeepSeek-V3's main model (671B, without multi-token prediction) trained with MuonClip: 1,024 chips or GPUs of 80 GB.

    k2jax inspect configs/deepseek_v3.py

Published: the model, learning rate, batch and balance (DeepSeek-V3 report 4.1, 4.2). The published run used AdamW, and
its batch grew from 3,072 sequences; here it is 15,360 throughout. Its last 500B tokens have a bias rate of 0.
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

BATCH_TOKENS = 15_360 * 4096


def config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=129_280,
            hidden_size=7168,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_shared_experts=1,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            rms_norm_eps=1e-6,
            rope=RopeConfig(
                rope_theta=10_000.0,
                factor=40.0,
                original_max_position_embeddings=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
        optim=OptimConfig(
            learning_rate=2.2e-4,
            final_learning_rate=2.2e-5,
            warmup_tokens=2000 * BATCH_TOKENS,
            constant_until_tokens=10_000_000_000_000,
            cosine_until_tokens=14_300_000_000_000,
        ),
        phases=PhasesConfig(
            start_tokens=(0, 14_300_000_000_000),
            rope=("plain", "plain"),
            router_bias_rate=(1e-3, 0.0),
            balance_alpha=(1e-4, 1e-4),
        ),
        data=DataConfig(path="data/deepseek", sequence_length=4096, batch_sequences=15_360),
        mesh=MeshConfig(fsdp=32, expert=32),
        train=TrainConfig(run_dir="runs/deepseek_v3", num_steps=235_240, num_microbatches=15, eval_sequences=1024),
    )
