"""Names of files in a run directory stand in RunFolder alone; elsewhere they could drift apart."""

import ast
from pathlib import Path

import pytest

from k2jax.runs.folder import RunFolder

ROOT = Path(__file__).parents[2] / "src" / "k2jax"
NAMES = {getattr(RunFolder(Path()), name).name for name in vars(RunFolder) if not name.startswith("_")}
# A published checkpoint has a config.json too, and a preparation's working folder a tokenizer.
OTHERS = {"interop": {"config.json"}, "data": {"tokenizer"}}


def literals(source: str, allowed: frozenset[str] | set[str] = frozenset()):
    """Lines where such a name is joined to a path, or stands as text of its own or at the end of a path in an f-string."""
    names = NAMES - allowed
    files = {name for name in names if "." in name}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            if str(node.right.value).split("/")[0] in names:
                yield node.lineno, node.right.value
        elif isinstance(node, ast.Constant) and node.value in files:
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            for part in node.values:
                text = part.value if isinstance(part, ast.Constant) else ""
                if text.startswith("/") and text[1:].split("/")[0].split(",")[0].split(" ")[0] in names:
                    yield node.lineno, text


FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "runs")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_of_a_runs_file_is_written_out(path):
    assert not list(literals(path.read_text(), OTHERS.get(path.relative_to(ROOT).parts[0], set())))


@pytest.mark.parametrize(
    "source",
    ["folder / 'metrics.jsonl'", "Path(run) / 'tb'", "folder / 'checkpoints/3'", "read('env.txt')", "f'{run}/tb'",
     "f'{run}/checkpoints, and'", "f'{folder / \"tokenizer\"}'"],
)  # fmt: skip
def test_the_rule_bites(source):
    assert list(literals(source))
    assert not list(literals('"""Writes metrics.jsonl and tb/."""\nf"{run}: see checkpoints"\nkinds["tokenizer"]'))
