"""Long sequences over `context`: the same logits and largest logits as on one device, and a share of its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import make_batch, make_values

from k2jax.config import ModelConfig
from k2jax.model.transformer import bias_declarations, build_model, declarations
from k2jax.sharding.rules import spec
from k2jax.sharding.zigzag import zigzag

LONG = 131_072


def long_model():
    return ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=2,
        q_lora_rank=16, kv_lora_rank=4, qk_nope_head_dim=8, qk_rope_head_dim=2, v_head_dim=8, intermediate_size=64,
    )  # fmt: skip


def on(mesh, config, function, *arrays):
    """Jitted function(model, *arrays) with shapes or values [B, T] placed on the mesh, and the placed arguments."""
    sizes = dict(mesh.shape)
    is_weight = lambda w: hasattr(w, "spec")  # noqa: E731
    place = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))  # noqa: E731
    weights = declarations(config), bias_declarations(config)
    layouts = jax.tree.map(lambda w: w.spec(sizes) if w.group else jax.P(), weights, is_leaf=is_weight)
    values = jax.tree.map(place, make_values(config, np.random.default_rng(0)), layouts)
    values = jax.tree.map(lambda x: x.astype(jnp.float32), values)
    run = jax.jit(lambda values, *x: function(lambda v: build_model(config, *v, jnp.dtype("float32")), values, *x))
    return run, (values, *(place(x, spec("BT")) for x in arrays))


@pytest.mark.parametrize(
    "axes", [{"context": 2}, {"context": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("length", [pytest.param(16, marks=pytest.mark.grid), 24])
def test_same_on_every_mesh(tiny, mesh_of, axes, length):
    """Logits in their own order, largest logits and loss; 24 tokens over context 4 x tensor 2 have blocks of 3."""
    tokens, targets, positions, segments = make_batch(tiny, np.random.default_rng(1), length=length)

    def look(model, values, tokens, targets, positions, segments):
        out = model(values)(tokens, positions, segments)
        return out.logits, out.report.max_logits, model(values)(tokens, positions, segments, targets=targets).loss

    found = []
    for mesh in (mesh_of(), mesh_of(**axes)):
        with jax.set_mesh(mesh):
            run, arguments = on(mesh, tiny, look, tokens, targets, positions, segments)
            found.append(jax.device_get(run(*arguments)))
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())  # float32: 2.3e-6


def test_balanced_order_and_back(mesh_of):
    """Every shard has as many visible pairs; a length that does not divide stays as it is."""
    with jax.set_mesh(mesh_of(context=4)):
        x = jnp.arange(32)[None]
        order = zigzag(x)
        assert np.array_equal(zigzag(order, back=True), x)
        assert len({int(part.sum()) for part in np.asarray(order).reshape(4, 8)}) == 1
        assert np.array_equal(zigzag(x[:, :12]), x[:, :12])


@pytest.mark.grid
def test_128k_tokens_over_eight_devices(mesh_of):
    """Forward: logits and largest logits agree with one device's. From compile alone: memory of both passes."""
    config, rng = long_model(), np.random.default_rng(0)
    tokens, targets = rng.integers(0, config.vocab_size, (2, 1, LONG), dtype=np.int32)

    def forward(model, values, tokens):
        out = model(values)(tokens)
        return out.logits, out.report.max_logits

    def gradient(model, values, tokens, targets):
        return jax.grad(lambda params: model((params, values[1]))(tokens, targets=targets).loss)(values[0])

    found, temporary = [], []
    for mesh in (mesh_of(), mesh_of(context=8)):
        with jax.set_mesh(mesh):
            run, arguments = on(mesh, config, gradient, tokens, targets)
            temporary.append(run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
            run, arguments = on(mesh, config, forward, tokens)
            # Of the suite's tests this is the one that takes longer to run than to compile.
            forward_of = run.lower(*arguments).compile({"xla_backend_optimization_level": 3})
            found.append(jax.device_get(forward_of(*arguments)))
    assert temporary[1] <= 1.3 / 8 * temporary[0], temporary
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
