"""Memory and traffic of a step with pipeline stages and without, read from the compiled program: docs/pipeline.md.

python benchmarks/pipeline.py compiles, and runs nothing: eight MoE layers of width 256 on four CPU devices, float32, 16
sequences of 128 tokens. Weights: bytes on one device of all-gathers, all-reduces and reduce-scatters in the forward and
backward pass, over all their runs in a step, the arrays' whole sizes; rows: of transfers from stage to stage.

--tpu: temporary bytes that another parameter of a stage costs, in bf16 compute, by compiling two widths of expert for
eight TPU v5p that are not here (libtpu: pip install 'k2jax[tpu-compiler]').
"""

import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from k2jax.config import Config, DataConfig, ModelConfig, TrainConfig  # noqa: E402
from k2jax.model.transformer import declarations  # noqa: E402
from k2jax.model.weights import weight_leaves
from k2jax.plan.aot import communication, compile_step  # noqa: E402
from k2jax.plan.collectives import collectives  # noqa: E402
from k2jax.plan.topology import topology_mesh  # noqa: E402
from k2jax.sharding.mesh import mesh_of  # noqa: E402
from k2jax.train.banner import bytes_per_device  # noqa: E402
from k2jax.train.compile_step import lower_step  # noqa: E402

MODEL = ModelConfig(
    vocab_size=512, hidden_size=256, num_hidden_layers=9, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=512, moe_intermediate_size=128,
    n_routed_experts=16, num_experts_per_tok=2,
)  # fmt: skip
WIDE = ModelConfig(
    vocab_size=1024, hidden_size=2048, num_hidden_layers=9, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128,
    intermediate_size=256, n_routed_experts=32, num_experts_per_tok=2,
)  # fmt: skip
MIB = 2**20
WEIGHTS = ("all-gather", "all-reduce", "reduce-scatter")
LAYOUTS = [
    ({"fsdp": 4}, 4, "layer"),
    ({"stage": 4}, 16, "layer"),
    ({"stage": 4}, 16, "none"),
    ({"stage": 2, "fsdp": 2}, 8, "layer"),
    ({"stage": 2, "fsdp": 2}, 8, "none"),
]


def measure(axes: dict[str, int], num_microbatches: int, remat: str) -> tuple[float, float, float]:
    """MiB of temporary memory, of weights and gradients moved, and of rows moved between stages; of one device."""
    config = Config(
        model=MODEL,
        data=DataConfig(sequence_length=128, batch_sequences=16),
        train=TrainConfig(num_microbatches=num_microbatches, compute_dtype="float32", remat=remat),
    ).replace({f"mesh.{axis}": size for axis, size in axes.items()})
    mesh = mesh_of(**axes)
    compiled = lower_step(config.validate(), mesh)[0].compile({"xla_backend_optimization_level": 0})
    moved = [row for row in communication(collectives(compiled.as_text(), mesh.shape)) if row["axes"]]
    weights = sum(r["bytes"] for r in moved if r["kind"] in WEIGHTS and r["part"] in ("forward", "backward"))
    rows = sum(r["bytes"] for r in moved if r["kind"] == "collective-permute")
    return compiled.memory_analysis().temp_size_in_bytes / MIB, weights / MIB, rows / MIB


def on_tpu(width: int) -> tuple[int, int, int]:
    """(parameters of a stage, temporary bytes, those of the gradients at rest) with experts of this width."""
    config = Config(
        model=WIDE,
        data=DataConfig(sequence_length=256, batch_sequences=16),
        train=TrainConfig(num_microbatches=8, eval_sequences=16, remat="none"),
    ).replace({"mesh.stage": 4, "mesh.fsdp": 2, "model.moe_intermediate_size": width})
    lowered, state = lower_step(config.validate(), topology_mesh(config.mesh, "v5p:2x2x2"))
    weights = weight_leaves(declarations(config.model))
    own = sum(w.size for w in weights if w.first_layer >= config.model.first_k_dense_replace) // config.mesh.stage
    return own, compile_step(lowered).memory_analysis().temp_size_in_bytes, bytes_per_device(state.params)


def tpu() -> None:
    (few, less, less_at_rest), (many, more, more_at_rest) = map(on_tpu, (512, 1024))
    own, at_rest = (more - less) / (many - few), (more_at_rest - less_at_rest) / (many - few)
    print(f"{own:.1f} bytes for a parameter of a stage, {at_rest:.1f} of them for its gradient at rest")


def main() -> None:
    print("| mesh | microbatches | remat | temporary MiB | weights MiB | rows MiB |\n|" + "---|" * 6)
    for axes, num_microbatches, remat in LAYOUTS:
        mesh = " x ".join(f"{axis} {size}" for axis, size in axes.items())
        temp, weights, rows = measure(axes, num_microbatches, remat)
        print(f"| {mesh} | {num_microbatches} | {remat} | {temp:.1f} | {weights:.1f} | {rows:.1f} |", flush=True)


if __name__ == "__main__":
    tpu() if "--tpu" in sys.argv[1:] else main()
