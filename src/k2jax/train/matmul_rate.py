"""The rate at which this machine multiplies matrices, measured once at the start: what a step's FLOPs are held against.

Peak figures of data sheets are not known for every device, and not reached by any matmul on most.
"""

import time

import jax
import jax.numpy as jnp

from k2jax.config import Config
from k2jax.model.flops import flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves

MOST_SECONDS = 0.3  # of repeats, after the first of them


def _shape(platform: str) -> tuple[int, int]:
    """(width of a square matmul, how many of them depend on each other in one program).

    An accelerator's must outlast its launch by far, a CPU's not take a second where one core stands in for 8 devices.
    """
    return (512, 1) if platform == "cpu" else (4096, 16)


def matmul_rate(dtype: str) -> float:
    """FLOP/s of each of this process's devices in a matmul of `dtype` that all of them do at once; the best of five."""
    devices = jax.local_devices()
    width, chain = _shape(devices[0].platform)
    mesh = jax.make_mesh((len(devices),), ("device",), (jax.sharding.AxisType.Explicit,), devices=devices)

    def ready() -> jax.Array:
        """[devices, width, width]; entries as random as it takes, since zeros cost some devices less."""
        x = jnp.sin(jnp.arange(width * width, dtype=jnp.float32)).reshape(width, width) / width**0.5
        return jax.lax.broadcast(x.astype(dtype), (len(devices),), out_sharding=jax.P("device"))

    def multiply(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(chain):
            y = jnp.matmul(x, y)
        return y

    with jax.set_mesh(mesh):
        x = jax.jit(ready)()
        compiled = jax.jit(multiply).lower(x).compile()
        jax.block_until_ready(compiled(x))
        seconds = []
        while len(seconds) < 5 and sum(seconds) < MOST_SECONDS:
            started = time.monotonic()
            jax.block_until_ready(compiled(x))
            seconds.append(time.monotonic() - started)
    return 2 * width**3 * chain / min(seconds)


def matmul_seconds(config: Config, num_devices: int) -> float:
    """Seconds that the model FLOPs of a step would take on so many devices at the rate of `matmul_rate`.

    FLOPs as in `flops_per_token`, without recomputation. Takes well below a second to measure.
    """
    per_token = flops_per_token(weight_leaves(declarations(config.model)), config.model, config.data.sequence_length)
    return per_token * config.batch_tokens / (matmul_rate(config.train.compute_dtype) * num_devices)
