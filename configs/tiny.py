"""A small K2 on two CPU cores, every feature on: `make train`, or

    k2jax train configs/tiny.py --simulate 1

Text: the Python standard library without its tests, in tokens of a BPE trained on it (data/stdlib, by `make data`).
"""

from k2jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PhasesConfig,
    TrainConfig,
)


def config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=2048,
            hidden_size=128,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=512,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            routed_scaling_factor=1.45,
            initializer_range=0.08,
        ),
        optim=OptimConfig(
            learning_rate=2e-2,
            final_learning_rate=8e-4,
            warmup_tokens=20 * 4096,
            constant_until_tokens=60 * 4096,
            cosine_until_tokens=200 * 4096,
            qk_clip_tau=12.0,
        ),
        guard=GuardConfig(window=32, loss_zscore=8.0, grad_norm_zscore=8.0),
        phases=PhasesConfig(start_tokens=(0,), rope=("plain",), router_bias_rate=(1e-3,), balance_alpha=(1e-4,)),
        data=DataConfig(path="data/stdlib", sequence_length=256, batch_sequences=16, prefetch_sequences=64),
        mesh=MeshConfig(),
        train=TrainConfig(
            run_dir="runs/tiny", num_steps=400, compute_dtype="float32", remat="none", log_every=10, eval_every=100
        ),
        checkpoint=CheckpointConfig(save_every=100),
    )
