"""Published checkpoints in small: the three shapes of the family, with weights drawn from a frozen random stream."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LONG_EVERY = 128  # of the long row's 2,048 positions, the golden files keep each so many-th

_COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 32,
    "vocab_size": 64,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_YARN = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
# With a theta and an original length this small, some pairs are slowed, some not, and (DeepSeek) some in between.
SHAPES = {
    "k2": _COMMON
    | {
        "model_type": "kimi_k2",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": _YARN
        | {"factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0},
        "max_position_embeddings": 2048,
    },
    "deepseek": _COMMON
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 20,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": _YARN
        | {"factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
        "max_position_embeddings": 2560,
    },
    "moonlight": _COMMON
    | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
    },
}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """{published name: shape}, written down from the published checkpoints, not from k2jax."""
    d, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{n}_head_dim"] for n in ("qk_nope", "qk_rope", "v"))

    def ffn(prefix, width):
        return {
            f"{prefix}.gate_proj.weight": (width, d),
            f"{prefix}.up_proj.weight": (width, d),
            f"{prefix}.down_proj.weight": (d, width),
        }

    names = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        names |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
        if rank := config["q_lora_rank"]:
            names |= {
                f"{at}.self_attn.q_a_proj.weight": (rank, d),
                f"{at}.self_attn.q_a_layernorm.weight": (rank,),
                f"{at}.self_attn.q_b_proj.weight": (heads * (nope + rope), rank),
            }
        else:
            names[f"{at}.self_attn.q_proj.weight"] = (heads * (nope + rope), d)
        names |= {
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": (latent + rope, d),
            f"{at}.self_attn.kv_a_layernorm.weight": (latent,),
            f"{at}.self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
            f"{at}.self_attn.o_proj.weight": (d, heads * value),
        }
        if layer < config["first_k_dense_replace"]:
            names |= ffn(f"{at}.mlp", config["intermediate_size"])
            continue
        width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
        names |= {f"{at}.mlp.gate.weight": (experts, d), f"{at}.mlp.gate.e_score_correction_bias": (experts,)}
        for expert in range(experts):
            names |= ffn(f"{at}.mlp.experts.{expert}", width)
        names |= ffn(f"{at}.mlp.shared_experts", config["n_shared_experts"] * width)
    return names | {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}


def draw_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights: gains near one, matrices that keep the size of what goes through, biases that change choices."""
    stream = np.random.RandomState(seed)  # the legacy stream is frozen for good
    tensors = {}
    for name, shape in shapes_of(config).items():
        value = stream.standard_normal(shape)
        if name.endswith("e_score_correction_bias"):
            value = 0.2 * value
        elif len(shape) == 1:
            value = 1 + 0.1 * value
        elif "embed_tokens" in name:
            value = 0.5 * value
        else:
            value = value * (1.5 / np.sqrt(shape[1]))
        tensors[name] = value.astype(np.float32)
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, np.ndarray], num_files: int = 1) -> Path:
    """config.json and the tensors, in one file or in several with an index, as the published ones are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = list(tensors), {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = names[i::num_files]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def inputs(config: dict) -> dict[str, np.ndarray]:
    """Tokens [2, 24], positions up to 16k with a stride, a long row [1, 2048], a prompt [1, 6]."""
    stream = np.random.RandomState(1)
    size = config["vocab_size"]
    return {
        "tokens": stream.randint(2, size, (2, 24)),
        "strided": np.broadcast_to(np.arange(24) * 700, (2, 24)).copy(),  # to 16,100
        "long": stream.randint(2, size, (1, 2048)),
        "prompt": stream.randint(2, size, (1, 6)),
    }
