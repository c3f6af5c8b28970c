"""Eight CPU devices before anything asks for one, the small model of most tests, and meshes."""

import os

import jax
import pytest

import k2jax
from k2jax.config import ModelConfig

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def start_backend() -> None:
    """XLA reads its flags once. LLVM's optimisation is a third of the suite's time, and nearly all of it is compiling; what
    tests start in processes of their own is compiled as users' runs are."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} --xla_backend_optimization_level=0"
    jax.devices()
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


start_backend()


def tiny_model() -> ModelConfig:
    """One dense and two MoE layers; every size differs where it can, so that a swapped dim is an error."""
    return ModelConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=14,
        qk_rope_head_dim=8,
        v_head_dim=10,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
    )


@pytest.fixture
def tiny() -> ModelConfig:
    return tiny_model()


@pytest.fixture
def mesh_of():
    """mesh_of(expert=4, tensor=2): that mesh on the first 8 devices, every other axis 1."""
    return k2jax.mesh_of
