"""The start-up check of the loss at the head, whose ids are cut over `tensor`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from k2jax.config import Config
from k2jax.model.head import head_loss
from k2jax.preflight import compare as size
from k2jax.preflight.compare import CheckResult, difference, on_one_device
from k2jax.sharding.compile_options import program_options
from k2jax.sharding.place import place, whole

IDS = 384  # of each shard


def check_loss(config: Config, mesh: jax.sharding.Mesh) -> CheckResult:
    """Loss, and its gradients for the hidden states and the head."""
    rng, num_ids = np.random.default_rng(0), IDS * mesh.shape["tensor"]
    length = math.lcm(size.TOKENS, mesh.shape["context"] * mesh.shape["tensor"])
    shape = mesh.shape["stage"], size.num_rows(mesh), length  # a pipeline cuts the loss over its microbatches
    x_YBTD = rng.normal(size=(*shape, size.HIDDEN)).astype(np.float32)
    w_DV = rng.normal(0, size.HIDDEN**-0.5, (size.HIDDEN, num_ids)).astype(np.float32)
    target_YBT = rng.integers(0, num_ids, shape, np.int32)
    dtype = jnp.dtype(config.train.compute_dtype)

    def chosen_path(x_YBTD, w_DV, target_YBT):
        def loss(x_YBTD, w_DV):
            return head_loss(place(x_YBTD, "YBTD").astype(dtype), place(w_DV, "DV"), place(target_YBT, "YBS"))

        return jax.tree.map(whole, jax.value_and_grad(loss, (0, 1))(x_YBTD, w_DV))

    def plain_path(x_YBTD, w_DV, target_YBT):
        x_YBTD, w_DV = (a.astype(dtype).astype(jnp.float32) for a in (x_YBTD, w_DV))
        loss = lambda x, w: optax.softmax_cross_entropy_with_integer_labels(x @ w, target_YBT).sum()  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(x_YBTD, w_DV)

    loss, (dx, dw) = jax.device_get(jax.jit(chosen_path, compiler_options=program_options(config.kernels, mesh))(x_YBTD, w_DV, target_YBT))
    want_loss, (want_dx, want_dw) = on_one_device(plain_path, x_YBTD, w_DV, target_YBT)
    found = [difference("loss", loss, want_loss), difference("gradient of the hidden states", dx, want_dx)]
    found.append(difference("gradient of the head", dw, want_dw))
    return CheckResult("loss at the head", found, "try another mesh")
