"""Values for the parameters of a model without declarations, chosen by their paths."""

import re
from collections.abc import Callable, Sequence

import jax
import optax


def path_name(path: tuple) -> str:
    """A parameter's key path as "encoder/attention/query/kernel", the same for a Flax NNX state and its pure form."""
    # nnx.Optimizer calls init() with Variables, whose arrays lie at ".value", and update() with the bare arrays.
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _compiled(rules: Sequence[tuple[str, object]]) -> list[tuple[re.Pattern, object]]:
    patterns, problems = [], []
    for pattern, value in rules:
        try:
            patterns.append((re.compile(pattern), value))
        except re.error as error:
            problems.append(f"{pattern!r}: is not a regular expression: {error}")
    if problems:
        raise ValueError(f"by_path: {'; '.join(problems)}")
    return patterns


def by_path(rules: Sequence[tuple[str, object]]) -> Callable[[optax.Params], optax.Params]:
    """A function from a pytree of parameters to one of values: labels, MatrixViews, QKParts or None.

    rules: (regular expression, value) pairs. The first expression that is found in a parameter's path, such as
    "encoder/attention/query/kernel", gives its value. Raises ValueError with every pattern that is not a regular
    expression. The function raises one with every parameter that none matches, and with every rule that decides for no
    parameter: a misspelt one would otherwise do nothing in silence.
    """
    patterns = _compiled(rules)

    def choose(params: optax.Params) -> optax.Params:
        used, unmatched = set(), []

        def value_of(path, param):
            name = path_name(path)
            for number, (pattern, value) in enumerate(patterns):
                if pattern.search(name):
                    used.add(number)
                    return value
            unmatched.append(name)
            return None

        # A parameter that an outer optax.partition has masked still has its path, and its rule.
        values = jax.tree_util.tree_map_with_path(value_of, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        problems = [f"{name}: no rule matches" for name in unmatched]
        problems += [f"{rule[0]!r}: decides for no parameter" for n, rule in enumerate(rules) if n not in used]
        if problems:
            raise ValueError(f"by_path: {'; '.join(problems)}")
        return values

    return choose
