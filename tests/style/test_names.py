"""A shape in a name is checked: einsum equations agree with the suffixes of what they read and write."""

import ast
import re
from pathlib import Path

import pytest

from k2jax.sharding.names import DIMS

ROOT = Path(__file__).parents[2] / "src" / "k2jax"
SUFFIX = re.compile(r"_([A-Z]+)$")
FILES = sorted(ROOT.rglob("*.py"))


def suffix_of(node):
    """x_BTD -> BTD; None for what is not a plain name with dims (a constant like FSDP_DIMS is no array)."""
    if not isinstance(node, ast.Name) or node.id.isupper():
        return None
    match = SUFFIX.search(node.id)
    return match and match[1]


def einsum_of(node):
    """(input letters, output letters, operands) where `node` calls einsum or project with a literal equation."""
    if not isinstance(node, ast.Call):
        return None
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    if name not in ("einsum", "project") or not isinstance(node.args[0], ast.Constant):
        return None
    equation, *operands = node.args
    inputs, _, output = equation.value.partition("->")
    return inputs.split(","), output, operands[:2] if name == "project" else operands


def slips(source):
    """Einsums whose letters are not the suffixes of their operands, or of the name they are assigned to."""
    for node in ast.walk(ast.parse(source)):
        if found := einsum_of(node):
            inputs, _, operands = found
            if len(inputs) != len(operands):
                yield f"line {node.lineno}: {len(inputs)} inputs for {len(operands)} operands"
            for letters, operand in zip(inputs, operands, strict=False):
                if (suffix := suffix_of(operand)) and suffix != letters:
                    yield f"line {node.lineno}: {operand.id} is read as {letters}"
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and (found := einsum_of(node.value)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if (suffix := suffix_of(target)) and suffix != found[1]:
                    yield f"line {node.lineno}: {target.id} is written as {found[1]}"


def used_letters(tree):
    """Every letter of a suffixed name or of an einsum."""
    for node in ast.walk(tree):
        name = ast.Name(node.arg) if isinstance(node, ast.arg) else node
        yield from suffix_of(name) or ""
        if found := einsum_of(node):
            yield from "".join(found[0]) + found[1]


def legend(tree):
    """Letters that the module's docstring explains: capitals that stand alone before a word."""
    return set(re.findall(r"\b([A-Z])\b(?= |,)", ast.get_docstring(tree) or ""))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_einsum_agrees_with_names(path):
    assert not list(slips(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_letter_is_explained(path):
    tree = ast.parse(path.read_text())
    assert not set(used_letters(tree)) - set(DIMS) - legend(tree)


def test_some_einsums_were_found():
    """Or the tests above would hold for want of any."""
    found = [n for path in FILES for n in ast.walk(ast.parse(path.read_text())) if einsum_of(n)]
    assert len(found) > 10


def test_the_rules_bite():
    good = "q_BTH = jnp.einsum('BTD,DH->BTH', x_BTD, w.use())\ny = np.einsum('ab,bc->ac', p, q)"
    assert not list(slips(good))
    bad = {
        "q_BTH = jnp.einsum('BTD,HD->BTH', x_BTD, w_DH)": "line 1: w_DH is read as HD",
        "q_BHT = jnp.einsum('BTD,DH->BTH', x_BTD, w_DH)": "line 1: q_BHT is written as BTH",
        "q_BTH += jnp.einsum('BTD,DH->BTD', x, y)": "line 1: q_BTH is written as BTD",
        "f(jnp.einsum('BTD,DH->BTH', x_BTD))": "line 1: 2 inputs for 1 operands",
        "q_BHT = project('BTD,DH->BTH', x_BTD, w, out_spec('BTH'))": "line 1: q_BHT is written as BTH",
    }
    for source, message in bad.items():
        assert list(slips(source)) == [message]
    assert set(used_letters(ast.parse("def f(x_BTW): return x_BTW"))) - set(DIMS) == {"W"}
    assert legend(ast.parse('"""Doc.\n\n    Y yaks, P pigs\n"""')) == {"Y", "P"}
