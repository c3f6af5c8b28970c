"""Muon as an optax transform: momentum, orthogonalisation, and the scale that makes it AdamW-like (Moonlight 2.2)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from k2jax.optim.assignment import Assignment
from k2jax.optim.newton_schulz import Quintic, coefficients_of, newton_schulz
from k2jax.optim.spread import spread


class MatrixView(NamedTuple):
    """The dims of a parameter that make its matrix: [stack..., inputs..., outputs...].

    assignment: how the matrices are spread over the mesh, for a leaf that is cut; None leaves it to XLA.
    """

    num_stack: int
    num_inputs: int
    assignment: Assignment | None = None


class MuonState(NamedTuple):
    momentum: optax.Params


def matrix_shape(shape: tuple[int, ...], view: MatrixView) -> tuple[int, int]:
    """(n, m) of each matrix of a parameter."""
    rest = shape[view.num_stack :]
    return math.prod(rest[: view.num_inputs]), math.prod(rest[view.num_inputs :])


def _dims(numbers: MuonDimensionNumbers) -> list[tuple[int, ...]]:
    """The reduction dims and the output dims, as they were given."""
    return [(dims,) if isinstance(dims, int) else tuple(dims) for dims in numbers]


def _order(numbers: MuonDimensionNumbers, ndim: int) -> tuple[list[int], MatrixView]:
    """optax's dimension numbers as an order of dims, and the view of the parameter in that order."""
    inputs, outputs = ([d % ndim for d in dims] for dims in _dims(numbers))
    stack = [d for d in range(ndim) if d not in (*inputs, *outputs)]
    return [*stack, *inputs, *outputs], MatrixView(len(stack), len(inputs))


def _fits(x: jax.Array, view) -> bool:
    """True if `view` makes matrices of x, with dims for inputs and for outputs and none of them twice."""
    if isinstance(view, MatrixView):
        return 0 <= view.num_stack and 0 < view.num_inputs and view.num_stack + view.num_inputs < x.ndim
    if not isinstance(view, MuonDimensionNumbers):
        return False
    dims = sum(_dims(view), ())
    inside = all(-x.ndim <= d < x.ndim for d in dims)
    return inside and all(_dims(view)) and len({d % x.ndim for d in dims}) == len(dims)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _views(dimension_numbers, updates) -> list:
    """A view for every leaf of updates, in their order. Raises ValueError with the leaves that theirs does not fit."""
    leaves, tree = jax.tree.flatten_with_path(updates, is_leaf=_is_masked)
    if callable(dimension_numbers):
        dimension_numbers = dimension_numbers(updates)
    if dimension_numbers is None or isinstance(dimension_numbers, (MatrixView, MuonDimensionNumbers)):
        views = [dimension_numbers] * len(leaves)
    else:
        try:
            views = tree.flatten_up_to(dimension_numbers)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"scale_by_muon: dimension_numbers are not shaped like the parameters: {error}") from None
    views = [MatrixView(0, 1) if view is None and getattr(x, "ndim", 0) == 2 else view
             for (_, x), view in zip(leaves, views, strict=True)]  # fmt: skip
    wrong = [
        f"{jax.tree_util.keystr(path)} {x.shape}" + f" by {view}" * (view is not None)
        for (path, x), view in zip(leaves, views, strict=True)
        if not (_is_masked(x) or _fits(x, view))
    ]
    if wrong:
        raise ValueError(
            f"scale_by_muon: no matrices: {', '.join(wrong)}; say by dimension_numbers which dims make theirs (at "
            "least one for inputs and one for outputs), or give these leaves to another transform (optax.partition)"
        )
    return views


def _orthogonal(x: jax.Array, view: MatrixView | MuonDimensionNumbers, iterate: Callable) -> jax.Array:
    """Every matrix of x through iterate([..., n, m]); same shape."""
    if isinstance(view, MuonDimensionNumbers):
        order, view = _order(view, x.ndim)
        back = [order.index(d) for d in range(x.ndim)]
        return _orthogonal(x.transpose(order), view, iterate).transpose(back)
    size = matrix_shape(x.shape, view)

    def whole(some: jax.Array) -> jax.Array:
        """Of [any stack..., inputs..., outputs...], every matrix whole."""
        matrices = some.reshape(*some.shape[: some.ndim - x.ndim + view.num_stack], *size)
        return iterate(matrices).reshape(some.shape)

    return (spread(whole, view.assignment) if view.assignment else whole)(x)


def _scaled(x: jax.Array, grad: jax.Array, view: MatrixView | MuonDimensionNumbers, rms: float) -> jax.Array:
    """x * rms * sqrt(max(n, m)) of its matrices, in the gradient's dtype."""
    shape = x.shape
    if isinstance(view, MuonDimensionNumbers):
        order, view = _order(view, x.ndim)
        shape = tuple(shape[d] for d in order)
    return rms * math.sqrt(max(matrix_shape(shape, view))) * x.astype(grad.dtype)


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: str | Sequence[Quintic] = "standard",
    rms: float = 0.2,
    dtype: jnp.dtype = jnp.bfloat16,
    dimension_numbers: optax.Params | Callable | None = None,
) -> optax.GradientTransformation:
    """O = NewtonSchulz(mu M + G) * rms * sqrt(max(n, m)), with M <- mu M + G (K2 report, Algorithm 1; Moonlight 2.2).

    The momentum is the plain sum, as Moonlight's: no bias correction. An update has root mean square `rms`, so that
    learning rate and decay are AdamW's. dtype: of Newton-Schulz. The momentum is float32, or float64 where the
    parameters are; the update has the gradient's dtype.
    dimension_numbers: None (all leaves are matrices), a MatrixView or an optax.contrib.MuonDimensionNumbers for all
    leaves, a pytree of these, or a function of the updates that gives one. A parameter with further dims is a stack of
    matrices, each orthogonalised by itself. Raises ValueError for unknown coefficients, a momentum outside [0, 1), an
    rms that is not positive, and for float16, which gradients would over- and underflow; in init() for leaves that have
    no matrix view.
    """
    coefficients_of(coefficients, ns_steps)  # for its errors
    # optax.inject_hyperparams traces these
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"scale_by_muon: {momentum = }: must be at least 0 and below 1")
    if not isinstance(rms, jax.core.Tracer) and not rms > 0:
        raise ValueError(f"scale_by_muon: {rms = }: must be greater than 0")
    if jnp.finfo(dtype).maxexp < jnp.finfo(jnp.float32).maxexp:
        raise ValueError(f"scale_by_muon: dtype = {jnp.dtype(dtype)}: must be bfloat16, float32 or float64")
    iterate = partial(newton_schulz, steps=ns_steps, dtype=dtype, coefficients=coefficients)

    def moved(buffer: jax.Array, grad: jax.Array) -> jax.Array:
        return (momentum * buffer + grad).astype(buffer.dtype)  # of one dtype for good, as scans and jit want it

    def init(params):
        _views(dimension_numbers, params)  # for its errors
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params))

    def update(updates, state, params=None):
        del params
        grads, tree = jax.tree.flatten(updates, is_leaf=_is_masked)
        views = _views(dimension_numbers, updates)
        buffers, orthogonal = tree.flatten_up_to(state.momentum), list(grads)
        ours = [i for i, grad in enumerate(grads) if not _is_masked(grad)]
        for before, i in zip([None, *ours], ours, strict=False):
            # One leaf after the other, or XLA would hold what is handed round of all of them at once. And the momentum
            # by itself, or XLA would make it along with what is handed round, and so not in the place of the old one.
            ready = () if before is None else orthogonal[before]
            buffers[i], ready = jax.lax.optimization_barrier((moved(buffers[i], grads[i]), ready))
            if before is not None:
                orthogonal[before] = ready
            target = momentum * buffers[i] + grads[i] if nesterov else buffers[i]
            orthogonal[i] = _orthogonal(target.astype(dtype), views[i], iterate)  # half the bytes to hand round
        for i in ours:
            orthogonal[i] = _scaled(orthogonal[i], grads[i], views[i], rms)
        return tree.unflatten(orthogonal), MuonState(tree.unflatten(buffers))

    return optax.GradientTransformation(init, update)
