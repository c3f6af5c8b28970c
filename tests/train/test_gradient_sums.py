"""In bf16 compute no sum over devices of a weight's gradient is in bf16."""

import dataclasses

import jax
import jax.numpy as jnp
from test_remat import equations, make_batch, mean_loss

from k2jax.model.transformer import declarations
from k2jax.model.weights import init_params


def test_experts_gradients_are_added_in_float32(tiny, mesh_of):
    """Read from the gradient's program: XLA's CPU backend adds bf16 in float32 whatever it is told, a TPU does not."""
    model = dataclasses.replace(tiny, num_hidden_layers=2)
    with jax.sharding.use_abstract_mesh(mesh_of(fsdp=2, expert=2, tensor=2).abstract_mesh):
        params = jax.eval_shape(lambda: init_params(declarations(model), jax.random.key(0), 0.1))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(model))
        jaxpr = jax.make_jaxpr(jax.grad(mean_loss(model, "layer", "bfloat16")))(params, batch)
    summed = [v.aval for e in equations(jaxpr.jaxpr) if e.primitive.name.startswith("psum") for v in e.invars]
    matrices = [aval.dtype for aval in summed if aval.ndim == 3]
    # gate, up and down of the MoE layer, and kv_b of both layers: its parts one by one would be summed in bf16 on GPUs
    assert len(matrices) == 5 and set(matrices) == {jnp.dtype("float32")}, summed
