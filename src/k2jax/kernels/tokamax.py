"""Kernels of tokamax: how it is imported beside our command line, and called inside `jax.shard_map`."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src import config as jax_config

from k2jax.errors import UserError

HOW_TO_INSTALL = "needs tokamax: pip install 'k2jax[kernels]', then pip install --no-deps tokamax==0.0.12"


def is_installed() -> bool:
    """True if Python finds tokamax; what it needs itself may still be missing."""
    return importlib.util.find_spec("tokamax") is not None


def load_tokamax(field: str):
    """The module. Raises UserError, which names `field` of `kernels`, where it is not installed."""
    try:
        from unittest import mock

        import typeguard

        # It was written for typeguard 2, whose decorator passed over jaxtyping's annotations; the 4 that tyro needs
        # cannot read them. What is lost are tokamax's checks of its own types.
        with mock.patch.object(typeguard, "typechecked", lambda function: function):
            import tokamax
        from absl import flags
    except ImportError as error:
        rule = f"{HOW_TO_INSTALL} ({error}; docs/experts.md)"
        raise UserError(f"kernels.{field} as 'tokamax', which 'auto' may mean: {rule}; or choose another") from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or it reads our command line as its own
    return tokamax


def kernel_problem(kernel: Callable, *arguments: tuple[tuple[int, ...], jnp.dtype]) -> str | None:
    """Why kernel(*arguments), or its gradient for the floats among them, does not even trace; None if it does.

    arguments: (shape, dtype) of each. What runs here is not ours and may raise anything for a jax that it does not know.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    floats = tuple(i for i, x in enumerate(shapes) if jnp.issubdtype(x.dtype, jnp.floating))

    def total(*x):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(kernel(*x)))

    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # it may be asked within a mesh
            jax.eval_shape(jax.grad(total, floats), *shapes)
    except UserError as error:
        return "; ".join(error.problems)
    except Exception as error:
        return f"tokamax does not work with jax {jax.__version__} here ({type(error).__name__}: {first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    """Of its message; its name if there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def call_kernel(kernel: Callable, *args: jax.Array):
    """kernel(*args), differentiable, with args and results that vary over the same mesh axes inside `jax.shard_map`.

    A Pallas call that does not say over which axes its results vary cannot be traced where JAX keeps account of that,
    as our gradients need it to. So kernel and gradient are traced without the account, and what they give enters it.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    with jax_config._check_vma(False):
        forward, (out, pull) = jax.make_jaxpr(lambda *x: jax.vjp(kernel, *x), return_shape=True)(*shapes)
        backward, gradients = jax.make_jaxpr(lambda pull, dout: pull(dout), return_shape=True)(pull, out)

    def run(jaxpr, result, *args):
        with jax_config._check_vma(False):
            found = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result), [_varying(x, axes) for x in found])

    @jax.custom_vjp
    def call(*args):
        return run(forward, (out, pull), *args)[0]

    call.defvjp(lambda *args: run(forward, (out, pull), *args), lambda pull, dout: run(backward, gradients, pull, dout))
    return call(*(_varying(x, axes) for x in args))
