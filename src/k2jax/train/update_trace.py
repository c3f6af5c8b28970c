"""Mistakes in a chain of optax that one traced update shows, without running anything.

An update is traced to a jaxpr, a list of equations `out = primitive(inputs)`, and read backward from its outputs.
"""

from collections.abc import Iterator

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from k2jax.optim.qk_clip import SCOPE

# Equations that hand on the numbers of their first operand.
_SAME_NUMBERS = {
    "convert_element_type", "copy", "copy_p", "reshape", "sharding_constraint", "squeeze", "transpose",
}  # fmt: skip
# Equations with a body that always runs, once, with its outputs in the same order.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
_BRANCHES = {"cond", "select_n", "while"}


def _body(equation: JaxprEqn) -> Jaxpr | None:
    """The jaxpr that a call runs, or None for an equation that is not a call."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    return getattr(inner, "jaxpr", inner)


def _is_clip(equation: JaxprEqn) -> bool:
    return SCOPE in str(equation.source_info.name_stack).split("/")


def _depends_on_clip(jaxpr: Jaxpr, out: Var | Literal) -> bool:
    """If an equation of qk_clip is among those that `out` is computed from."""
    needed = {out} if not isinstance(out, Literal) else set()
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        bodies = jaxprs_in_params(equation.params)
        if _is_clip(equation) or any(_depends_on_clip(body, made) for body in bodies for made in body.outvars):
            return True
        needed |= {var for var in equation.invars if not isinstance(var, Literal)}
    return False


def _after_clip(jaxpr: Jaxpr, out: Var | Literal) -> str | None:
    """Name of the last primitive between qk_clip and the variable `out`; None if `out` is as qk_clip returned it.

    "nothing" if `out` is an input or a constant, which no primitive made.
    """
    made_by = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    while not isinstance(out, Literal) and out in made_by:
        equation = made_by[out]
        if _is_clip(equation):
            return None
        if (inner := _body(equation)) is not None:
            inner_out = inner.outvars[equation.outvars.index(out)]
            passed_on = not isinstance(inner_out, Literal) and inner_out in inner.invars
            if not passed_on:
                return _after_clip(inner, inner_out)
            out = equation.invars[inner.invars.index(inner_out)]
        elif equation.primitive.name == "optimization_barrier":
            out = equation.invars[equation.outvars.index(out)]
        elif equation.primitive.name in _SAME_NUMBERS:
            out = equation.invars[0]
        else:
            return equation.primitive.name
    return "nothing"


def not_clipped(jaxpr: Jaxpr, outs: dict[str, Var]) -> Iterator[str]:
    """A line for each update that is not what qk_clip returned for it in every step.

    jaxpr: of an update; outs: its output variables, by the names of their parameters.
    """
    for name, out in outs.items():
        last = _after_clip(jaxpr, out)
        if last is None:
            continue
        if not _depends_on_clip(jaxpr, out):
            yield f"{name} is not reached by qk_clip"
        elif last in _BRANCHES:
            yield f"{name} is clipped in some steps only ({last} chooses)"
        else:
            yield f"{name} is changed after its clip (by {last})"
