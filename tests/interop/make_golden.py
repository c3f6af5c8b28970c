"""Makes golden/*.npz: what transformers' DeepseekV3 code computes on the small checkpoints of tiny_published.py.

python tests/interop/make_golden.py      (needs the extra [interop]; says which versions made the files)
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_published import LONG_EVERY, SHAPES, draw_tensors, inputs, write_checkpoint
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

GOLDEN = Path(__file__).parent / "golden"


def load_reference(folder: Path):
    """transformers' model of a checkpoint, float32, plain attention; raises where a weight was not loaded."""
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    config.model_type = "deepseek_v3"  # kimi_k2 is not registered
    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def watch(model):
    """Lists that fill with each MoE layer's (choices, weights) and each layer's largest logit of every head."""
    routing, largest = [], []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _, __, out: routing.append((out[2], out[1])))
    plain = deepseek.eager_attention_forward

    def attention(module, query, key, value, mask, scaling, **kwargs):
        logits = query @ key.transpose(2, 3) * scaling
        logits = logits + mask if mask is not None else logits
        largest.append(logits.detach().amax((0, 2, 3)))
        return plain(module, query, key, value, mask, scaling, **kwargs)

    deepseek.eager_attention_forward = attention
    return routing, largest, lambda: setattr(deepseek, "eager_attention_forward", plain)


def gradient_norms(model, config) -> dict[str, float]:
    """Norm of the gradient of each published tensor; transformers keeps a layer's experts in two stacks."""
    norms = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        at = name.removesuffix("experts.gate_up_proj").removesuffix("experts.down_proj")
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                norms[f"{at}experts.{expert}.gate_proj.weight"] = float(gate.norm())
                norms[f"{at}experts.{expert}.up_proj.weight"] = float(up.norm())
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(gradient):
                norms[f"{at}experts.{expert}.down_proj.weight"] = float(down.norm())
        else:
            norms[name] = float(gradient.norm())
    return norms


def compute(folder: Path, config: dict) -> dict[str, np.ndarray]:
    model, given = load_reference(folder), inputs(config)
    tokens, strided, long, prompt = (torch.tensor(given[k]) for k in ("tokens", "strided", "long", "prompt"))
    routing, largest, unwatch = watch(model)
    out = model(tokens, output_hidden_states=True, use_cache=False)
    unwatch()
    logits = out.logits[:, :-1].reshape(-1, config["vocab_size"])
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
    loss.backward()
    norms = gradient_norms(model, config)
    order = [torch.sort(choice, -1) for choice, _ in routing]
    with torch.no_grad():
        # without a mask, transformers takes positions with gaps for packed documents and lets none see another
        far = model(tokens, position_ids=strided, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        end = model(long, use_cache=False).logits[:, LONG_EVERY - 1 :: LONG_EVERY]
        greedy = prompt
        for _ in range(24):
            greedy = torch.cat([greedy, model(greedy, use_cache=False).logits[:, -1:].argmax(-1)], -1)
    return {
        "logits": out.logits.detach().numpy(),
        "hidden": torch.stack(out.hidden_states).detach().numpy(),
        "choices": torch.stack([o.values for o in order]).numpy(),
        "weights": torch.stack([w.gather(-1, o.indices) for (_, w), o in zip(routing, order)]).detach().numpy(),
        "max_logits": torch.stack(largest).numpy(),
        "loss": loss.detach().numpy(),
        "gradient_names": np.array(list(norms)),
        "gradient_norms": np.array(list(norms.values())),
        "strided_logits": far.numpy(),
        "long_logits": end.numpy(),
        "greedy": greedy.numpy(),
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, config in SHAPES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = write_checkpoint(Path(place) / name, config, draw_tensors(config))
            found = compute(folder, config)
        versions = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
        np.savez_compressed(GOLDEN / f"{name}.npz", versions=versions, **found)
        print(name, versions, f"{(GOLDEN / f'{name}.npz').stat().st_size:,} bytes, loss {found['loss']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
