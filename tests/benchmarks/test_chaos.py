"""The fault scoreboard runs, and its judge tells a run that came to other bits."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def chaos(*arguments: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, str(BENCHMARKS / "chaos.py"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=500)


def test_an_unknown_row_is_named():
    done = chaos("--only", "A1,Z9")
    assert done.returncode == 2 and "no such row: Z9; there are A1, A2" in done.stderr


@pytest.mark.grid
def test_a_few_rows():
    done = chaos("--only", "A8,B5,C5")
    assert done.returncode == 0 and "PASS + LOUD 3 of 3, FAIL 0, SILENT 0" in done.stdout, done.stdout + done.stderr
