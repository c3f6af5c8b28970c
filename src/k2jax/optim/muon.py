"""Muon as an optax transform: momentum, orthogonalisation, and the scale that makes it AdamW-like (Moonlight 2.2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from k2jax.optim.newton_schulz import newton_schulz


class MatrixView(NamedTuple):
    """Which dims of a parameter make its matrix: [stack..., inputs..., outputs...].

    layouts: shardings of [stack..., n, m] to pass through, one after the other, on the way to Newton-Schulz and back.
    """

    num_stack: int
    num_inputs: int
    layouts: tuple[P, ...] = ()


class MuonState(NamedTuple):
    momentum: optax.Params


def as_matrices(x: jax.Array, view: MatrixView) -> jax.Array:
    """[stack..., inputs..., outputs...] -> [stack..., n, m]."""
    stack, rest = x.shape[: view.num_stack], x.shape[view.num_stack :]
    return x.reshape(*stack, math.prod(rest[: view.num_inputs]), math.prod(rest[view.num_inputs :]))


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def scale_by_muon(
    views: optax.Params,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_dtype: jnp.dtype = jnp.bfloat16,
    rms: float = 0.2,
) -> optax.GradientTransformation:
    """O = NewtonSchulz(mu M + G) * rms * sqrt(max(n, m)), with M <- mu M + G (K2 report, Algorithm 1).

    views: pytree of MatrixView like the parameters. The momentum is the plain sum, as Moonlight's: no bias
    correction. An update has root mean square `rms`, so learning rate and decay are AdamW's.
    """

    def orthogonalise(m: jax.Array, view: MatrixView) -> jax.Array:
        matrices = as_matrices(m, view)
        for layout in view.layouts:
            matrices = jax.lax.with_sharding_constraint(matrices, layout)
        orthogonal = rms * math.sqrt(max(matrices.shape[-2:])) * newton_schulz(matrices, ns_steps, ns_dtype)
        for layout in reversed(view.layouts):
            orthogonal = jax.lax.with_sharding_constraint(orthogonal, layout)
        return orthogonal.reshape(m.shape)

    def init(params):
        return MuonState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        buffer = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        target = jax.tree.map(lambda m, g: momentum * m + g, buffer, updates) if nesterov else buffer
        orthogonal = jax.tree.map(
            lambda m, view: m if _is_masked(m) else orthogonalise(m, view), target, views, is_leaf=_is_masked
        )
        return orthogonal, MuonState(buffer)

    return optax.GradientTransformation(init, update)
