"""Load balancing without a loss: the router's bias moves against each expert's load (arXiv 2408.15664)."""

import jax
import jax.numpy as jnp


def update_router_bias(bias: jax.Array, expert_load: jax.Array, rate: float) -> jax.Array:
    """bias [layers, E] after a step whose whole batch gave `expert_load` [layers, E].

    b_i += rate * (sign(e_i) - mean_j sign(e_j)), e = mean load - load: underloaded experts rise, and the mean
    of the bias does not drift (Moonlight, appendix C).
    """
    load = expert_load.astype(jnp.float32)
    sign = jnp.sign(load.mean(-1, keepdims=True) - load)
    return bias + rate * (sign - sign.mean(-1, keepdims=True))
