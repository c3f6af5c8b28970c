"""The start-up check passes on every mesh as it is, and fails for whatever is broken on purpose."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from k2jax.config import Config, KernelsConfig, MeshConfig, TrainConfig
from k2jax.errors import RunFailed, UserError
from k2jax.kernels import chunked_attention, cross_entropy, grouped_matmul
from k2jax.model.choices import describe_attention
from k2jax.preflight import availability, compare
from k2jax.preflight.availability import check_kernels
from k2jax.preflight.self_check import is_on, self_check
from k2jax.sharding import exchange, transports


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Widths and tokens of a test."""
    for name, size in {"HIDDEN": 16, "WIDTH": 8, "TOKENS": 8}.items():
        monkeypatch.setattr(compare, name, size)


def config_of(model, dtype="float32", **kernels):
    return Config(model=model, kernels=KernelsConfig(**kernels), train=TrainConfig(compute_dtype=dtype))


def check(config, mesh):
    with jax.set_mesh(mesh):
        return self_check(config, mesh)


@pytest.mark.parametrize(
    ("axes", "kernels", "dtype"),
    [
        ({}, {}, "float32"),
        ({"expert": 4, "context": 2}, {"exchange": "ring"}, "float32"),
        ({"stage": 2, "fsdp": 2, "expert": 2}, {}, "float32"),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"grouped_matmul": "ragged_dot", "expert_buffer": 1.0}, "bfloat16"),
    ],
)
def test_it_passes_and_says_what_and_how_long(tiny, mesh_of, axes, kernels, dtype):
    line = check(config_of(tiny, dtype, **kernels), mesh_of(**axes))
    assert kernels.get("grouped_matmul", "blocked") in line and line.endswith(" s") and "balanced loads" not in line
    assert ("ring x 4" in line) == ("exchange" in kernels)


def broken_transport(monkeypatch):
    """Two shards' rows come back in each other's place."""
    whole = transports.sum_rows
    monkeypatch.setattr(transports, "sum_rows", lambda y, *a: whole(y[::-1], *a))


def broken_gradient(monkeypatch):
    """The values are right, and the gradient lacks a row of each block."""
    good = grouped_matmul._put

    def put(y, tile, at, own):
        return good(y, tile, at, own & (jax.numpy.arange(len(own)) > 0)[:, None] if y.shape[1] == 16 else own)

    monkeypatch.setattr(grouped_matmul, "_put", put)


def lossy_route(monkeypatch):
    """One row of each expert is lost on the way."""
    monkeypatch.setattr(exchange, "kept_rows", lambda count, *_: jax.numpy.maximum(count - 1, 0))
    monkeypatch.setattr(exchange, "Route", lambda *a: transports.Route(*a[:6], jax.numpy.maximum(a[6] - 1, 0), a[7]))


@pytest.mark.parametrize("breakage", [broken_transport, broken_gradient, lossy_route])
def test_it_fails_and_names_what_is_wrong(tiny, mesh_of, monkeypatch, breakage):
    breakage(monkeypatch)
    with pytest.raises(RunFailed) as failure:
        check(config_of(tiny), mesh_of(expert=4))
    for said in ("exchange dense x 4", "grouped matmul blocked", "largest error", "float32 allows 0.0001",
                 "kernels.exchange", "train.self_check = 'off'"):  # fmt: skip
        assert said in str(failure.value)


def test_auto_is_for_several_processes(tiny, monkeypatch):
    config = config_of(tiny)
    assert not is_on(config)
    assert is_on(config.replace({"train.self_check": "on"}))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert is_on(config)
    assert not is_on(config.replace({"train.self_check": "off"}))


def test_kernels_that_a_cpu_lacks_are_the_users_to_mend(tiny, mesh_of):
    config = config_of(tiny, exchange="ragged", grouped_matmul="tokamax", attention="tokamax")
    config = config.replace({"data.sequence_length": 200})
    with pytest.raises(UserError) as error:
        check_kernels(config, mesh_of(expert=2, context=2))
    fields = ["exchange", "grouped_matmul", "attention", "attention"]
    assert [p.split(" =")[0] for p in error.value.problems] == [
        *(f"kernels.{f}" for f in fields),
        "data.sequence_length",
    ]
    assert "such as 256" in error.value.problems[-1]
    check_kernels(config_of(tiny, exchange="ragged"), mesh_of(fsdp=2))  # nothing to exchange


def far_mesh(platform, **axes):
    """As much of a mesh of absent devices as the choice of kernels looks at."""
    sizes = dataclasses.asdict(MeshConfig(**axes))
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape=sizes)


@pytest.mark.parametrize(
    ("platform", "attention", "length", "context", "said"),
    [
        ("tpu", "auto", 4096, 1, "tokamax's splash kernel"),
        ("tpu", "auto", 4096, 2, "chunks of 256 queries and keys"),
        ("tpu", "auto", 4000, 1, "chunks of 256 queries and keys"),
        ("tpu", "chunked", 4096, 1, "chunks of 256 queries and keys"),
        ("gpu", "auto", 4096, 1, "chunks of 256 queries and keys"),
        ("gpu", "tokamax", 4096, 1, "tokamax's kernels"),
        ("cpu", "auto", 4096, 1, "chunks of 256 queries and keys"),
    ],
)
def test_attention_goes_by_platform_and_mesh_and_is_said(
    tiny, monkeypatch, platform, attention, length, context, said
):
    """Without tokamax there is no other way than what is chosen: one error that names it and both remedies."""
    config = config_of(tiny, attention=attention).replace({"data.sequence_length": length})
    mesh = far_mesh(platform, context=context)
    assert describe_attention(config, mesh) == said
    for installed in (True, False):
        monkeypatch.setattr(availability, "is_installed", lambda installed=installed: installed)
        if installed or "chunks" in said:
            check_kernels(config, mesh)
            continue
        with pytest.raises(UserError) as error:
            check_kernels(config, mesh)
        (problem,) = error.value.problems
        assert problem.startswith(f"kernels.attention = '{attention}'")
        assert "pip install --no-deps tokamax" in problem and "use 'chunked'" in problem


def skipped_chunk(monkeypatch):
    """Attention passes over the last chunk of queries that sees a chunk of keys."""
    good = chunked_attention._turns
    monkeypatch.setattr(chunked_attention, "_turns", lambda *a: (good(*a)[0], good(*a)[1] - 1))


def unshifted_targets(monkeypatch):
    """Every shard of the head takes a target's number for that of one of its own ids."""
    monkeypatch.setattr(cross_entropy._Head, "is_target", lambda self, id_V, target_T: target_T[:, None] == id_V)


@pytest.mark.parametrize(
    ("breakage", "axes", "said"),
    [
        (skipped_chunk, {}, "attention chunked: wrong on this mesh: attention's output, "),
        (unshifted_targets, {"tensor": 2}, "loss at the head: wrong on this mesh: loss, "),
    ],
)
def test_it_fails_for_attention_and_loss(tiny, mesh_of, monkeypatch, breakage, axes, said):
    breakage(monkeypatch)
    with pytest.raises(RunFailed, match=said):
        check(config_of(tiny), mesh_of(**axes))


def test_a_model_without_experts_has_the_rest_to_check(tiny, mesh_of):
    dense = dataclasses.replace(tiny, first_k_dense_replace=tiny.num_hidden_layers)
    line = check(config_of(dense), mesh_of())
    assert line.startswith("self-check: attention chunked: within") and "loss at the head" in line
