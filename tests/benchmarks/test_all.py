"""The driver of all benchmarks: what it reads of a script's output, and what a failed script leaves in the table."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("all", None)
    import all

    yield all
    sys.modules.pop("all", None)


def test_reads_every_line_that_measure_prints(driver, capsys):
    from measure import report

    report("speed", "1.70 x, 20 pairs", "at least 1.6 x", True)
    report("share: CPU", "0.7", "at most 0.632", False)
    report("peak", "1.1 GiB")
    printed = capsys.readouterr().out.splitlines()
    assert [driver.parse(text) for text in printed] == [
        ("pass", "speed", "1.70 x, 20 pairs (at least 1.6 x)"),
        ("FAIL", "share", "CPU: 0.7 (at most 0.632)"),
        ("", "peak", "1.1 GiB"),
    ]
    assert driver.parse("einsum / project: 1.9") == ("", "einsum / project", "1.9")
    assert driver.parse("nothing to see") is None


def test_a_script_that_breaks_is_a_row(driver, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("print('      a: 1 | 2')\nraise SystemExit(3)\n")
    (tmp_path / "missed.py").write_text("print('FAIL  a: 1 (at least 2)')\nraise SystemExit(1)\n")
    monkeypatch.setattr(driver, "HERE", tmp_path)
    for name, want in (
        (
            "broken.py",
            ["| `broken.py` | a | 1 \\| 2 |  |", "| `broken.py` | the script itself | ended with 3 | FAIL |"],
        ),
        ("missed.py", ["| `missed.py` | a | 1 (at least 2) | FAIL |"]),
    ):
        benchmark = driver.Benchmark(name)
        assert driver.rows(benchmark, *driver.run(benchmark)) == want


def test_every_script_is_there(driver):
    assert [b.script for b in driver.BENCHMARKS if not (SCRIPTS / b.script).is_file()] == []
