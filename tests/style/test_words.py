"""One word, one meaning: names in the code use a word in its own rooms alone; and docstrings say what things are."""

import ast
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
ROOT = TOP / "src" / "k2jax"
# A word, and the only files (by the beginning of their path) in whose names it may stand.
ROOMS = {
    "plan": ("plan/", "cli/plan.py"),
    "phase": ("plan/", "config.py", "config_rules.py", "train/", "cli/", "interop/"),
    "assignment": ("optim/", "plan/", "train/optimizer.py"),
    "recipe": ("data/text/", "cli/data.py"),
    "segment": ("inference/", "plan/", "data/", "train/", "cli/audit.py", "model/", "kernels/", "preflight/", "config.py"),
    "zigzag": ("sharding/", "model/"),
    "sealed": ("files.py", "data/store/", "runs/"),
}
# Names that said something else than what they named, and what took their place.
GONE = {
    "Plan": "Assignment or Recipe", "Places": "TokenIndex", "Place": "RowOrigin", "Part": "CheckResult", "Loaded": "LoadedModel",
    "Found": "StoredDocument", "Checked": "VerifiedFolder", "Published": "PublishedCheckpoint", "Passed": "PipelineOutput",
    "Routing": "LayerReport", "balanced": "zigzag or level", "balance": "update_router_bias", "ragged_plan": "ragged_slices",
    "shared": "replicated", "plan_run": "settle_timeline", "make_plans": "make_assignments", "StagesConfig": "PhasesConfig",
}  # fmt: skip
SOURCES = sorted(p for folder in ("src", "tests", "benchmarks", "docs", "configs") for p in (TOP / folder).rglob("*.py"))
FILES = [p for p in SOURCES if p.is_relative_to(ROOT)]


def names_of(tree):
    """(line, name) of every function, class, argument and variable that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def strangers(source, path):
    """Names in a file that use a word of another room, or that are gone."""
    tree = ast.parse(source)
    for line, name in names_of(tree):
        words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+", name)}
        for word in sorted(words & ROOMS.keys()):
            if not path.startswith(ROOMS[word]):
                yield f"line {line}: {name}: {word!r} belongs to {', '.join(ROOMS[word])}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in GONE:
            yield f"line {node.lineno}: {node.name} is called {GONE[node.name]}"


def vague(source):
    """Docstrings that begin with a question word instead of saying what a thing is, returns or does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if re.match(r"(What|Which|Whether|Where|How)\b", text):
                yield f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_words_stay_in_their_rooms(path):
    assert not list(strangers(path.read_text(), path.relative_to(ROOT).as_posix()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(TOP)))
def test_no_docstring_begins_with_a_question_word(path):
    assert not list(vague(path.read_text()))


def test_the_rules_bite():
    assert len(list(strangers("def make_plans(plan): recipe = 3", "optim/x.py"))) == 4
    assert not list(strangers("def f(assignment): stage = 3", "optim/x.py"))
    assert list(vague('"""What it is."""\ndef f():\n    """Whether it is."""\n    "How"')) == [
        "line 1: What it is.", "line 2: Whether it is.",
    ]  # fmt: skip
