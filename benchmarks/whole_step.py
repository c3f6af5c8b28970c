"""A whole training step against the DeepSeek-V3 of transformers and torchtitan, compiled, with Muon, in float32 on a CPU.

    make comparators && python benchmarks/whole_step.py

Ours has MuonClip, QK-Clip, the router's balancing and all metrics; theirs Muon and AdamW (comparators/torch_muon.py).
Each runs in a process of its own, compiled and warm; then they take turns of a few steps, so that all see the same
machine. The first step of a turn is not counted: in training a step follows a step, while here it would pay for memory
that the system took back during the others' turns. Same shapes, 8 x 512 tokens of a vocabulary of 4,096. Exits with 1
where a bound is missed.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import matmul_rate, report
from optimizer_share import config, make_step

from k2jax.launch.distributed import use_cpu_devices

HERE = Path(__file__).parent
COMPARATOR_PYTHON = HERE.parent / ".venv-comparators/bin/python"
AT_LEAST = {"transformers": 1.6, "torchtitan": 1.15}  # times their tokens/s
STEPS_OF_TURN = 3
RATE_GOAL = 0.45  # of the machine's own matmul
THEIR_FIELDS = (  # of their config.json, with our values
    "vocab_size hidden_size num_hidden_layers first_k_dense_replace num_attention_heads q_lora_rank kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size n_routed_experts "
    "num_experts_per_tok n_shared_experts n_group topk_group routed_scaling_factor rms_norm_eps"
).split()


def step_flops() -> tuple[float, float]:
    """FLOPs of one step: the model's, forward and backward, and Newton-Schulz's in its plain form."""
    from k2jax.model.flops import flops_per_token
    from k2jax.model.transformer import declarations
    from k2jax.model.weights import weight_leaves
    from k2jax.optim.assignment import matrix_flops

    run = config(8, 1)
    leaves = weight_leaves(declarations(run.model))
    muon = [w for w in leaves if w.group == "muon"]
    counts = [math.prod(w.shape[: w.num_stack]) for w in muon]
    steps = run.optim.ns_steps
    newton = sum(n * matrix_flops(w.shape, w.num_stack, w.num_inputs, steps) for n, w in zip(counts, muon, strict=True))
    return flops_per_token(leaves, run.model, run.data.sequence_length) * run.batch_tokens, newton


def work() -> None:
    """The process of ours: says that it is ready, then takes a step for every line that it reads."""
    use_cpu_devices(1)
    started = time.perf_counter()
    step = make_step(config(8, 1))
    step()
    flops, newton = step_flops()
    ready = {"ready": time.perf_counter() - started, "flops": flops, "newton_schulz_flops": newton}
    print(json.dumps(ready | {"matmul_rate": matmul_rate()}), flush=True)
    for line in sys.stdin:
        if line.strip() == "rate":
            print(json.dumps({"matmul_rate": matmul_rate()}), flush=True)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        record = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(record), flush=True)


class Worker:
    """A process that answers every line with one of JSON."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[1]} ended early, with {self.process.wait()}; its error is above")
        return json.loads(line)

    def ask(self, line: str = "") -> dict:
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def task(experts: str) -> str:
    """The job of a comparator's process, as JSON."""
    model = config(8, 1).model
    sizes = {name: getattr(model, name) for name in THEIR_FIELDS}
    return json.dumps({"sizes": sizes, "experts": experts, "batch": [8, 512], "threads": 2})


def median(records: list[dict], key: str) -> float:
    return statistics.median(r[key] for r in records)


def take_turns(workers: dict[str, Worker], rounds: int) -> tuple[dict[str, list[dict]], list[float]]:
    """Means over each worker's turns, and the matmul rates that were measured between them."""
    records, rates = {name: [] for name in workers}, []
    for turn in range(rounds):
        for name, worker in list(workers.items())[:: 1 if turn % 2 else -1]:  # neither always comes after another
            worker.ask()
            steps = [worker.ask() for _ in range(STEPS_OF_TURN)]
            records[name].append({key: statistics.mean(step[key] for step in steps) for key in steps[0]})
        if turn % 5 == 4:
            rates.append(workers["k2jax"].ask("rate")["matmul_rate"])
    return records, rates


def show(records: dict[str, list[dict]], starts: dict[str, dict], rates: list[float]) -> bool:
    """Print all figures; whether every bound holds."""
    tokens, ours, held = config(8, 1).batch_tokens, records["k2jax"], []
    for name in (n for n in records if n != "k2jax"):
        pairs = list(zip(ours, records[name], strict=True))
        speed, cpu = (statistics.median(b[key] / a[key] for a, b in pairs) for key in ("wall", "cpu"))
        figure = f"{speed:.2f} x its tokens/s, {cpu:.2f} x fewer CPU-seconds, {len(pairs)} turns"
        held.append(report(f"against {name}", figure, f"at least {AT_LEAST[name]} x", speed >= AT_LEAST[name]))
    start, wall, rate = starts["k2jax"], min(r["wall"] for r in ours), max(rates)
    share, whole = start["flops"] / wall / rate, (start["flops"] + start["newton_schulz_flops"]) / wall / rate
    figure = f"{share:.0%} for the model's FLOPs alone, {whole:.0%} with Newton-Schulz's; goal {RATE_GOAL:.0%}"
    report("share of the matmul rate", f"{figure}; {rate / 1e9:.0f} GFLOP/s")
    for name in records:
        wall, cpu = median(records[name], "wall"), median(records[name], "cpu")
        peak, ready = records[name][-1]["peak_bytes"] / 2**30, starts[name]["ready"]
        figure = f"{wall:.2f} s and {cpu:.2f} CPU-seconds a step of {tokens:,} tokens"
        report(name, f"{figure}; {peak:.1f} GiB at most; ready after {ready:.0f} s")
    return all(held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--against", nargs="*", choices=tuple(AT_LEAST), default=tuple(AT_LEAST))
    parser.add_argument("--experts", default="grouped_mm", help="transformers' implementation (default: %(default)s)")
    parser.add_argument("--python", default=COMPARATOR_PYTHON, help="of the comparators' environment")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    if args.against and not Path(args.python).exists():
        print(f"{args.python}: is not there; make the comparators' environment by `make comparators`")
        return 2
    workers, starts = {}, {}
    commands = {"k2jax": (sys.executable, __file__, "--worker")}
    commands |= {name: (args.python, HERE / f"comparators/{name}_step.py", task(args.experts)) for name in args.against}
    for name, command in commands.items():  # one after the other, so that compile times are each one's own
        workers[name] = Worker(*command)
        starts[name] = workers[name].answer()
    records, rates = take_turns(workers, args.rounds)
    for worker in workers.values():
        worker.close()
    return 0 if show(records, starts, [starts["k2jax"]["matmul_rate"], *rates]) else 1


if __name__ == "__main__":
    sys.exit(main())
