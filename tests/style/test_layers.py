"""Imports point one way: each package may import those that stand before it, and never a sibling."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "k2jax"
# Lowest first. Packages of one row are siblings: each can be read, and used, without the others.
LAYERS = [
    {"errors", "words"},
    {"files", "dtypes", "processes", "tables", "user_code"},
    {"storage"},
    {"config_rules"},
    {"config"},
    {"sharding", "kernels", "optim", "data", "runs"},
    {"model"},
    {"launch", "report"},
    {"preflight"},
    {"train"},
    {"inference", "plan"},
    {"interop"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The rooms of data, in their own order.
DATA_LEVEL = {"splitmix": 0, "tokenizer": 0, "saved_tokenizer": 1, "store": 2, "text": 3, "loader": 3}
WITHOUT_JAX = (
    "cli", "config.py", "config_rules.py", "data/store", "data/text", "errors.py", "files.py", "launch", "processes.py",
    "report", "runs", "storage.py", "words.py",
)  # fmt: skip


def room_of(path):
    """src/k2jax/model/moe.py -> model, None; src/k2jax/data/text/job.py -> data, text; src/k2jax/config.py -> config"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0], parts[1] if parts[0] == "data" else None


def imported_rooms(source, package):
    """(line, package, room of data or None) of every import of k2jax, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative", None
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names]
            for _, other, *rest in (name.split(".") for name in names if name.startswith("k2jax.")):
                yield node.lineno, other, rest[0] if other == "data" and rest else None


def wrong_imports(source, package, room=None):
    """Imports of `source`, a file of `package`, that point up or sideways; relative ones are wrong anywhere."""
    for line, other, other_room in imported_rooms(source, package):
        if other != package and LEVEL.get(other, 99) >= LEVEL[package]:
            yield line, other
        elif other == package == "data" and other_room != room and DATA_LEVEL[other_room] >= DATA_LEVEL[room]:
            yield line, f"data.{other_room}"


FILES = sorted(p for p in ROOT.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package, room = room_of(path)
    wrong = wrong_imports(path.read_text(), package, room)
    assert not [f"line {line}: {package} imports {other}" for line, other in wrong]


def test_every_file_is_in_a_room():
    assert len(FILES) > 100
    assert {room_of(p)[0] for p in FILES} == set(LEVEL)
    flat = {p.stem for p in (ROOT / "data").glob("*.py")} - {"__init__"}
    assert flat == {"saved_tokenizer", "splitmix", "tokenizer"} and {room_of(p)[1] for p in FILES} - {None} == set(
        DATA_LEVEL
    )


@pytest.mark.parametrize(
    ("package", "room", "source"),
    [
        ("model", None, "from k2jax.train.step import x"),
        ("optim", None, "import k2jax.sharding.place"),
        ("optim", None, "def f():\n    from k2jax.model import weights"),
        ("kernels", None, "from k2jax.sharding.rules import spec"),
        ("config", None, "from k2jax import sharding"),
        ("runs", None, "from .folder import x"),
        ("data", "store", "from k2jax.data.loader import rows"),
        ("data", "text", "from k2jax.data.loader.rows import x"),
        ("data", "tokenizer", "from k2jax.data import saved_tokenizer"),
    ],
)
def test_the_rule_bites(package, room, source):
    assert len(list(wrong_imports(source, package, room))) == 1


def modules_of(paths):
    return [".".join(p.relative_to(ROOT.parent).with_suffix("").parts) for p in paths]


def imported_alone(modules, then):
    """Import modules in a fresh process, then run a statement there."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n{then}"
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_import_has_a_side_effect_on_jax():
    """Every module imports without asking for devices, which would start a backend before the flags are read."""
    then = "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
    imported_alone(modules_of(FILES), then)


def test_what_a_supervisor_reads_needs_no_jax():
    paths = [p for p in FILES if p.relative_to(ROOT).as_posix().startswith(WITHOUT_JAX)]
    assert len(paths) > 30
    imported_alone(modules_of(paths), "assert 'jax' not in sys.modules, 'jax was imported'")
