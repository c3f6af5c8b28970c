"""Programs of all processes' devices, compiled by each process before the first of them runs one."""

from collections.abc import Callable

import jax

from k2jax.processes import barrier, is_joined

COMPILE_SECONDS = 3600  # between the first process that has compiled a program and the last


def all_have_compiled() -> None:
    """Return when all processes have come as far, each of which compiles for itself.

    The first collective of a process waits 30 s for the others, not more.
    """
    barrier("compile", COMPILE_SECONDS)


def compile_together(function: Callable, *arguments) -> jax.stages.Compiled:
    """The jitted function, compiled for these arguments, when all processes have come as far."""
    compiled = function.lower(*arguments).compile()
    all_have_compiled()
    return compiled


def compiled_when_called(function: Callable) -> Callable:
    """The jitted function, compiled by `compile_together` at its first call with arguments of such shapes and layouts.

    Alone there is nobody to wait for, and jax's own dispatch, which looks at each argument once, is all that it takes.
    """
    if not is_joined():
        return function
    programs: dict[object, jax.stages.Compiled] = {}

    def call(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        if key not in programs:
            programs[key] = compile_together(function, *arguments)
        return programs[key](*arguments)

    return call
