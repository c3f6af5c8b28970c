"""Eight CPU devices before anything asks for one, the small model of most tests, and meshes."""

import os

import jax
import pytest
from compile_flags import COMPILE_FLAGS

import k2jax
from k2jax.config import ModelConfig

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def start_backend() -> None:
    """XLA reads its flags once; a process that a test starts, and that does not say otherwise, compiles as users' runs do."""
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} {COMPILE_FLAGS}"
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


@pytest.fixture
def environment(monkeypatch):
    """Credentials, and nothing else that a service of buckets looks at; connections and mirrors of the test's own."""
    from bucket_server import KEY

    from k2jax import storage
    from k2jax.runs import mirror

    context = storage.shared_context.__wrapped__()
    monkeypatch.setattr(storage, "shared_context", lambda: context)
    monkeypatch.setattr(mirror, "_mirrors", {})
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", KEY)  # a variable of TensorStore's
    return monkeypatch


@pytest.fixture
def s3(tmp_path, environment):
    """All that a server is asked at which the folders of tmp_path are buckets."""
    from bucket_server import S3, serve

    with serve(tmp_path, S3) as (url, asked):
        environment.setenv("AWS_ENDPOINT_URL", f"{url}/")
        yield asked


@pytest.fixture
def gcs(tmp_path, environment):
    from bucket_server import GCS, serve

    with serve(tmp_path, GCS) as (url, asked):
        environment.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        yield asked
