"""Shared by the comparators: Muon as K2 has it in PyTorch, and a loop that takes a step for every line that it reads.

Matrices by torch.optim.Muon (adjust_lr_fn="match_rms_adamw"); the stacks of experts, which it refuses, by the same formula
over the stack at once; AdamW for embedding, head and gains. No QK-Clip and no router-bias balancing.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import torch

STANDARD = (3.4445, -4.7750, 2.0315)
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@torch.compile
def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps on every matrix of [..., n, m], in float32."""
    a, b, c = STANDARD
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """Muon for stacks of matrices [..., n, m]."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad)
                update = orthogonalise(p.grad.add(momentum, alpha=0.95))
                p.mul_(1 - 0.1 * group["lr"]).add_(update, alpha=-0.2 * max(p.shape[-2:]) ** 0.5 * group["lr"])


def make_optimizers(model: torch.nn.Module, rate: float = 1e-4) -> list:
    """Muon for the matrices of all layers, AdamW for the rest."""
    named = dict(model.named_parameters())
    plain = {n for n, p in named.items() if p.ndim == 1 or "embed" in n or "lm_head" in n}
    matrices = [p for n, p in named.items() if p.ndim == 2 and n not in plain]
    stacks = [p for n, p in named.items() if p.ndim == 3]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        StackedMuon(stacks, rate),
        torch.optim.AdamW([named[n] for n in plain], lr=rate, fused=True, **ADAMW),
    ]


def serve(forward: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module, task: dict, started: float) -> None:
    """Train `model` on random tokens; forward: tokens [B, T] to logits [B, T, V], compiled."""
    optimizers = make_optimizers(model)
    sequences, length = task["batch"]
    tokens = torch.randint(task["sizes"]["vocab_size"], (sequences, length + 1))

    def step() -> float:
        logits = forward(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    loss = step()
    for _ in range(2):
        step()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"ready": time.perf_counter() - started, "loss": loss, "parameters": parameters}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        record = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(record), flush=True)
