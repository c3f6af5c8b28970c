"""The largest logits for QK-Clip from attention kernels that give only a log-sum-exp (K2 report 2.1; exact)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def lse_gate(lse: jax.Array, tau: float, exact: Callable[[], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(logits for `qk_clip` with this tau, float32 in the shape of lse; bool: whether they are the true maxima).

    lse: each head's largest log-sum-exp of scaled logits over its queries, such as [layers, H], in any float dtype.
    exact: gives the true maxima [...] by a pass of its own, which runs only where a head might be clipped: max <= LSE
    <= max + ln(keys), so where all LSEs are at most tau no head is over it, and the LSEs, which no clip looks at
    further, stand for the maxima. LSEs are taken for one rounding larger than they say, since a kernel may have rounded
    one that was over tau down to it: in bfloat16 the step near 100 is 0.5. NaN and infinity go to the exact pass.
    """
    wide = lse.astype(jnp.float32)
    bound = wide + jnp.abs(wide) * jnp.finfo(lse.dtype).eps
    closed = jnp.all(bound <= tau)
    return jax.lax.cond(closed, lambda: wide, lambda: exact().astype(jnp.float32)), ~closed
