"""transformers' DeepseekV3 under torch.compile, with Muon: a worker of whole_step.py."""

import json
import sys
import time

import torch
from torch_muon import serve
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def make_model(sizes: dict, experts: str) -> DeepseekV3ForCausalLM:
    """The model of those sizes, named as in its config.json."""
    config = DeepseekV3Config(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        num_nextn_predict_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config)
    model.set_experts_implementation(experts)
    return model.train()


def main() -> None:
    task, started = json.loads(sys.argv[1]), time.perf_counter()
    torch.set_num_threads(task["threads"])
    model = make_model(task["sizes"], task["experts"])
    compiled = torch.compile(model)
    serve(lambda tokens: compiled(input_ids=tokens).logits, model, task, started)


if __name__ == "__main__":
    main()
