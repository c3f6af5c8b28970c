"""The loss at the head, on a mesh: ids over `tensor`, tokens over all other axes.

B sequences, T, S positions, D hidden, V vocabulary
"""

import jax

from k2jax.kernels.cross_entropy import linear_cross_entropy_sum
from k2jax.sharding.rules import on_mesh, place, spec, uncut_axes, varying


def head_loss(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array) -> jax.Array:
    """Sum over all positions of -log softmax(x @ w)[target], in nats; at least float32."""

    def local(x_BTD, w_DV, target_BS):
        if not on_mesh():
            return linear_cross_entropy_sum(x_BTD.reshape(-1, x_BTD.shape[-1]), w_DV, target_BS.reshape(-1))
        # Every shard of the head looks at the same tokens; gathered here, so that their gradient is reduce-scattered.
        x_BTD = jax.lax.all_gather(x_BTD, "tensor", axis=1, tiled=True)
        w_DV = varying(w_DV, "DV")
        loss = linear_cross_entropy_sum(x_BTD.reshape(-1, x_BTD.shape[-1]), w_DV, target_BS.reshape(-1), "tensor")
        return jax.lax.psum(loss, uncut_axes("V"))

    if on_mesh():
        local = jax.shard_map(local, in_specs=(spec("BTD"), spec("DV"), spec("BS")), out_specs=spec(""))
    return local(x_BTD, w_DV, place(target_BT, "BS"))
