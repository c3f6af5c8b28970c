"""The published config.json files (k2-facts 1.1) against configs/*.py: every field of the network, and its RoPE."""

from pathlib import Path

import pytest

from k2jax.cli.overrides import load_config
from k2jax.interop.hf_config import hf_config, model_config

CONFIGS = Path(__file__).parents[2] / "configs"
SAME = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
PUBLISHED = {
    "k2_1t": SAME
    | {
        "model_type": "kimi_k2",
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "first_k_dense_replace": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "quantization_config": FP8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    },
    "deepseek_v3": SAME
    | {
        "model_type": "deepseek_v3",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "quantization_config": FP8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "vocab_size": 129280,
    },
    "moonlight_16b": SAME
    | {
        "model_type": "deepseek_v3",
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
        "vocab_size": 163840,
    },
}
TRAINING_ONLY = ("aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "quantization_config", "initializer_range")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_file_is_the_published_network(name):
    """All but initializer_range, which in the published files is a default of the library."""
    ours = load_config(str(CONFIGS / f"{name}.py")).validate().model
    theirs, rope = model_config(PUBLISHED[name])
    assert rope == ("plain" if name == "moonlight_16b" else "yarn")
    same = {"vocab_size", *vars(theirs)} - {"initializer_range"}
    assert {key: getattr(ours, key) for key in same} == {key: getattr(theirs, key) for key in same}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_what_is_written_says_what_was_read(name):
    """Every published field comes back, but for the model type and what only training or storage knows."""
    model, rope = model_config(PUBLISHED[name])
    published = PUBLISHED[name]
    ids = published["bos_token_id"], published["eos_token_id"]
    written = hf_config(model, rope, published["max_position_embeddings"], "bfloat16", *ids)
    changed = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 0}
    for key, value in published.items():
        if key not in TRAINING_ONLY:
            assert written[key] == changed.get(key, value), key
    assert model_config(written) == (model, rope)
