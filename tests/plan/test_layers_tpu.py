"""The layers of a small model compiled by libtpu, alone and in the whole step: `make test-tpu`."""

import jax
import pytest

from k2jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, TrainConfig
from k2jax.plan.aot import compile_step, describe_step, program_text
from k2jax.plan.collectives import collectives
from k2jax.plan.layer_program import describe_layers, lower_layers
from k2jax.plan.topology import topology_mesh

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        jax.version.__version_info__ < (0, 11), reason="jax 0.10.2 cannot read the programs of libtpu 0.0.52"
    ),
]
# What gives XLA's collectives to SparseCore, as MaxText sets it for v5p.
ON_SPARSECORE = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "ragged_all_to_all")
}


def small() -> Config:
    """All sizes that XLA's TPU kernels tile: a few matrices of 128."""
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 2}
    sizes |= {"q_lora_rank": 128, "kv_lora_rank": 128, "intermediate_size": 256, "moe_intermediate_size": 512}
    return Config(
        model=ModelConfig(**sizes, n_routed_experts=16, num_experts_per_tok=6),
        data=DataConfig(sequence_length=1024, batch_sequences=16),
        kernels=KernelsConfig(expert_buffer=1.5),
        mesh=MeshConfig(fsdp=2, expert=4),
        train=TrainConfig(num_microbatches=2),
    )


def test_layers_alone_have_the_step_s_figures(capsys):
    config = small()
    mesh = topology_mesh(config.mesh, "v5p:2x2x2")
    step, layers = describe_step(config, mesh)["program"]["layer"], describe_layers(config, mesh)["layer"]
    with capsys.disabled():
        print(f"\nstep   {step}\nlayers {layers}")
    assert (step["runs"], layers["runs"]) == (4 * 2, 4)
    for key in ("flops", "crossings", "ragged_dot_over_useful"):
        assert layers[key] == pytest.approx(step[key], rel=0.005), key
    assert layers["crossings"] > 4.9 and layers["flops_over_model"] > 1


def test_collectives_given_to_sparsecore_are_seen():
    """As many bytes of each kind over each axis as without; there they stand in calls of calls."""
    config = small()
    mesh = topology_mesh(config.mesh, "v5p:2x2x2")
    lowered = lower_layers(config, mesh)
    texts = [program_text(compile_step(lowered, options)) for options in ({}, ON_SPARSECORE)]
    assert ["custom-call-start" in text and "call-update" in text for text in texts][1]
    exchanged = [
        sum(one.runs * one.array_bytes for one in collectives(text, mesh.shape) if one.kind == "ragged-all-to-all")
        for text in texts
    ]
    assert exchanged[0] == exchanged[1] > 0
