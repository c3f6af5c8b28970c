"""In bf16 compute every gradient stays near the float32 one: no sum over many tokens is kept in eight bits."""

import dataclasses

import jax
import numpy as np

from k2jax.config import Config, TrainConfig
from k2jax.model.rope import make_rope
from k2jax.model.transformer import declarations, init_router_bias
from k2jax.model.weights import init_params
from k2jax.train.batch import Batch
from k2jax.train.step import make_loss


def gradients(model, params, batch, dtype: str):
    loss_fn = make_loss(Config(model=model, train=TrainConfig(compute_dtype=dtype)))
    rope = make_rope(model, "plain")
    mean = jax.jit(jax.grad(lambda p: loss_fn(p, init_router_bias(model), batch, rope).loss / batch.inputs.size))
    return jax.tree_util.tree_leaves_with_path(jax.device_get(mean(params)))


def test_gradients_of_4096_tokens(tiny):
    """Half of all tokens are one token, whose embedding row sums two thousand gradients; experts are all chosen."""
    model = dataclasses.replace(tiny, num_experts_per_tok=tiny.n_routed_experts, num_hidden_layers=2)
    params = init_params(declarations(model), jax.random.key(0), 0.1)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((64, 65)) < 0.5, 7, rng.integers(0, model.vocab_size, (64, 65))).astype(np.int32)
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (64, 64))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, np.zeros((64, 64), np.int32))
    exact, rounded = (gradients(model, params, batch, dtype) for dtype in ("float32", "bfloat16"))
    errors = {
        jax.tree_util.keystr(path): float(np.linalg.norm(g16 - g) / np.linalg.norm(g))
        for (path, g), (_, g16) in zip(exact, rounded, strict=True)
    }
    assert max(errors.values()) < 0.04, errors  # 0.034 measured; 0.45 for the embedding with a bf16 sum
