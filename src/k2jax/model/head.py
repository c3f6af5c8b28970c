"""The loss at the head, on a mesh: ids over `tensor`, tokens over all other axes.

Y microbatches, B sequences, T, S positions, D hidden, V vocabulary
"""

import jax

from k2jax.kernels.cross_entropy import linear_cross_entropy_sum
from k2jax.sharding.names import AXES
from k2jax.sharding.place import on_mesh, place, uncut_axes, varying
from k2jax.sharding.rules import spec


def head_loss(x: jax.Array, w_DV: jax.Array, targets: jax.Array) -> jax.Array:
    """Sum over all positions of -log softmax(x @ w)[target], in nats; at least float32.

    x [B, T, D] and targets [B, T], or both with a leading dim Y.
    """
    is_cut = on_mesh()
    x_YBTD, target_YBT = (x, targets) if targets.ndim == 3 else (x[None], targets[None])

    def local(x_YBTD, w_DV, target_YBS):
        if is_cut:
            # Every shard of the head looks at the same tokens; gathered here, so that their gradient is scattered back.
            x_YBTD = jax.lax.all_gather(x_YBTD, "tensor", axis=2, tiled=True)
            w_DV = varying(w_DV, "DV", AXES)
        x, targets = x_YBTD.reshape(-1, x_YBTD.shape[-1]), target_YBS.reshape(-1)
        loss = linear_cross_entropy_sum(x, w_DV, targets, "tensor" if is_cut else None)
        return jax.lax.psum(loss, uncut_axes("V", AXES)) if is_cut else loss

    if is_cut:
        local = jax.shard_map(local, in_specs=(spec("YBTD"), spec("DV"), spec("YBS")), out_specs=spec(""))
    return local(place(x_YBTD, "YBTD"), w_DV, place(target_YBT, "YBS"))
