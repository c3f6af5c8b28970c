"""Imports point one way: a package knows only those below it, and never a sibling."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "k2jax"
# Lowest first; packages of one row are siblings. sharding reads config, kernels read nothing.
LAYERS = [
    {"checks"},
    {"config", "files", "dtypes"},
    {"sharding", "kernels"},
    {"model"},
    {"optim"},
    {"data"},
    {"train"},
    {"interop", "plan"},
    {"launch"},
]
# Side by side in the middle, so that each can be read, and used, without the others.
SIBLINGS = [{"sharding", "kernels"}, {"model", "optim", "data"}, {"interop", "plan"}]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def package_of(path):
    """src/k2jax/model/moe.py -> model, src/k2jax/config.py -> config"""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_packages(source, package):
    """(line, package of k2jax) of every import, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, package  # relative: within the package, as no file of k2jax is two levels deep
        elif isinstance(node, ast.ImportFrom) and node.module == "k2jax":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("k2jax."))


def wrong_imports(source, package):
    """Imports of `source`, a file of `package`, that point up or sideways."""
    for line, other in imported_packages(source, package):
        siblings = any({package, other} <= row for row in SIBLINGS)
        if other != package and (siblings or LEVEL[other] >= LEVEL[package]):
            yield line, other


FILES = sorted(p for p in ROOT.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package = package_of(path)
    assert not [f"line {line}: {package} imports {other}" for line, other in wrong_imports(path.read_text(), package)]


def test_every_file_was_found():
    assert len(FILES) > 20
    assert {package_of(p) for p in FILES} <= set(LEVEL)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("model", "from k2jax.train.step import x"),
        ("model", "import k2jax.optim.muon"),
        ("optim", "def f():\n    from k2jax.model import weights"),
        ("kernels", "from k2jax.sharding.rules import spec"),
        ("config", "from k2jax import sharding"),
    ],
)
def test_the_rule_bites(package, source):
    assert len(list(wrong_imports(source, package))) == 1


def test_no_import_has_a_side_effect_on_jax():
    """Every module imports without asking for devices, which would start a backend before the flags are read."""
    modules = [".".join(p.relative_to(ROOT.parent).with_suffix("").parts) for p in FILES]
    code = f"import importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
