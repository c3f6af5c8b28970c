"""torchtitan's DeepSeek-V3 with each block under torch.compile, with Muon: a worker of whole_step.py.

Its experts multiply in bfloat16 whatever the dtype of the model is. Attention is its causal scaled-dot-product backend:
FlexAttention has no backward pass on a CPU.
"""

import json
import sys
import time
from functools import partial

import torch
from torch import nn
from torch_muon import serve
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, build_mla_moe_layers

NORMAL, ONES = {"weight": partial(nn.init.normal_, std=0.02)}, {"weight": nn.init.ones_}
EXPERTS = {name: partial(nn.init.normal_, std=0.02) for name in ("w1_EFD", "w2_EDF", "w3_EFD")}


def make_model(sizes: dict, length: int) -> nn.Module:
    """The model of those sizes, which are named as in transformers' config.json."""
    width, vocab = sizes["hidden_size"], sizes["vocab_size"]
    layers = build_mla_moe_layers(
        n_layers=sizes["num_hidden_layers"],
        n_dense_layers=sizes["first_k_dense_replace"],
        dim=width,
        n_heads=sizes["num_attention_heads"],
        q_lora_rank=sizes["q_lora_rank"],
        kv_lora_rank=sizes["kv_lora_rank"],
        qk_nope_head_dim=sizes["qk_nope_head_dim"],
        qk_rope_head_dim=sizes["qk_rope_head_dim"],
        v_head_dim=sizes["v_head_dim"],
        mscale=1.0,
        dense_hidden_dim=sizes["intermediate_size"],
        moe_hidden_dim=sizes["moe_intermediate_size"],
        num_experts=sizes["n_routed_experts"],
        num_shared_experts=sizes["n_shared_experts"],
        router_top_k=sizes["num_experts_per_tok"],
        router_score_func="sigmoid",
        router_route_scale=sizes["routed_scaling_factor"],
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=NORMAL,
        norm_init=ONES,
        depth_init=lambda layer: NORMAL,
        depth_experts_init=lambda layer: EXPERTS,
        rope=ComplexRoPE.Config(dim=sizes["qk_rope_head_dim"], max_seq_len=length, theta=50_000.0, scaling="none"),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config = DeepSeekV3Model.Config(
        vocab_size=vocab,
        dim=width,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=width, param_init=NORMAL),
        norm=RMSNorm.Config(normalized_shape=width, param_init=ONES),
        lm_head=Linear.Config(in_features=width, out_features=vocab, param_init=NORMAL),
        layers=layers,
    )
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model.train()


def main() -> None:
    task, started = json.loads(sys.argv[1]), time.perf_counter()
    torch.set_num_threads(task["threads"])
    model = make_model(task["sizes"], task["batch"][1])
    for block in model.layers.values():
        block.compile()
    positions = torch.arange(task["batch"][1]).expand(task["batch"][0], -1)
    serve(lambda tokens: model(tokens, positions), model, task, started)


if __name__ == "__main__":
    main()
