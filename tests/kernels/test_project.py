"""The weight's gradient leaves its matmul, and is added up over devices, in float32."""

import jax
import jax.numpy as jnp

from k2jax.kernels.project import project


def test_parts_of_a_gradient_are_added_in_float32(mesh_of):
    """Read from the gradient's program: XLA's CPU backend adds bf16 in float32 whatever it is told, a TPU does not."""
    mesh = mesh_of(fsdp=8)
    of_rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))
    x, dy = (jax.ShapeDtypeStruct((512, n), jnp.bfloat16, sharding=of_rows) for n in (6, 10))
    w = jax.ShapeDtypeStruct((6, 10), jnp.bfloat16, sharding=whole)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x, w, dy: jax.vjp(lambda w: project("BD,DF->BF", x, w), w)[1](dy)[0])(x, w, dy)
    outputs = [v.aval for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.outvars]
    assert [aval.dtype for aval in outputs if aval.shape == (6, 10)] == [jnp.dtype("float32")], outputs
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
