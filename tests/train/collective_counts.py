"""Collectives of the whole compiled training step on six meshes: what the golden files hold.

python tests/train/make_golden.py writes them. A count changes where the layout of an array, an exchange or the remat
policy changes; make new files when that was meant, and look at the difference: it is what a step now communicates.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax

import k2jax
from k2jax.config import Config, DataConfig, ModelConfig, TrainConfig
from k2jax.plan.collectives import Collective, collectives
from k2jax.train.compile_step import lower_step

FOLDER = Path(__file__).parent / "golden"
MESHES = [
    {"fsdp": 8},
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 2, "expert": 4},
    {"stage": 2, "fsdp": 2, "expert": 2},
]
# MoE layers of a stage, and microbatches for each of them: no other loop of a step turns as often.
NUM_MOE_LAYERS, NUM_MICROBATCHES = 7, 3


def path_of(axes: dict[str, int]) -> Path:
    return FOLDER / ("_".join(f"{axis}{size}" for axis, size in axes.items()) + ".json")


def counted(found: list[Collective], stages: int) -> list[dict]:
    """Counts of collectives by kind, axes and trip count. bytes: of one run of each."""
    turns = NUM_MICROBATCHES * stages + stages - 1
    where = {1: "step", turns: "microbatch" if stages == 1 else "tick", turns * NUM_MOE_LAYERS: "MoE layer"}
    counts, sizes = Counter(), Counter()
    for one in found:
        key = where.get(one.runs, f"{one.runs} times"), one.kind, "+".join(one.axes) or "none"
        counts[key] += 1
        sizes[key] += one.num_bytes
    names = ("where", "kind", "axes")
    return [dict(zip(names, key, strict=True)) | {"count": counts[key], "bytes": sizes[key]} for key in sorted(counts)]


def count(model: ModelConfig, axes: dict[str, int]) -> list[dict]:
    """`counted` of the step of `model` with one dense layer, in float32 (XLA's CPU backend has no bf16 collectives)."""
    stages = axes.get("stage", 1)
    config = Config(
        model=dataclasses.replace(model, num_hidden_layers=1 + NUM_MOE_LAYERS * stages),
        data=DataConfig(sequence_length=16, batch_sequences=8 * NUM_MICROBATCHES),
        train=TrainConfig(num_microbatches=NUM_MICROBATCHES * stages, compute_dtype="float32", remat="layer"),
    ).replace({"optim.ns_dtype": "float32"})
    mesh = k2jax.mesh_of(**axes)
    compiled = lower_step(config, mesh)[0].compile(compiler_options={"xla_backend_optimization_level": 0})
    return counted(collectives(compiled.as_text(), mesh.shape), stages)


def write(axes: dict[str, int], counts: list[dict]) -> None:
    lines = ",\n".join(f"  {json.dumps(line)}" for line in counts)
    FOLDER.mkdir(exist_ok=True)
    head = f'"jax": "{jax.__version__}", "mesh": {json.dumps(axes)}'
    path_of(axes).write_text(f'{{{head}, "collectives": [\n{lines}\n]}}\n')


def read(axes: dict[str, int]) -> dict:
    return json.loads(path_of(axes).read_text())
