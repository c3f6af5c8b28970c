"""Every benchmark that a CPU finishes in minutes, one after the other, as one table.

    make bench

Each is a script beside this one, in a process of its own, so that none sees another's memory or compilations. A script
prints lines `pass|FAIL|    name: figure (bound)`, see measure.report, or plain `name: figure`, and exits with 1 where it
misses a bound; a new one joins by a line in BENCHMARKS. The table goes to build/benchmarks.md. Exits with 1 where a bound
was missed or a script failed. Nothing else may run on the machine meanwhile.
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TABLE = HERE.parent / "build/benchmarks.md"
COMPARATORS = HERE.parent / ".venv-comparators/ready"


class Benchmark(NamedTuple):
    """A script with its arguments; whether it needs what `make comparators` installs."""

    script: str
    arguments: tuple[str, ...] = ()
    compares: bool = False


BENCHMARKS = (
    Benchmark("muon.py"),
    Benchmark("project.py"),
    Benchmark("moe_layer.py"),
    Benchmark("attention.py"),
    Benchmark("loss.py"),
    Benchmark("remat.py"),
    Benchmark("compile_time.py"),
    Benchmark("optimizer_share.py", ("--pairs", "12", "--large-pairs", "3")),
    Benchmark("whole_step.py", compares=True),
)


class Line(NamedTuple):
    """One figure of a benchmark."""

    verdict: str  # "pass", "FAIL", or "" where there is no bound
    name: str
    figure: str


def parse(text: str) -> Line | None:
    """A line of a benchmark's output; None where it has no figure, as in a traceback."""
    found = re.fullmatch(r"(?:(pass|FAIL|    )  )?(\S[^:]*): (.*\S)\s*", text)
    return Line((found[1] or "").strip(), found[2], found[3]) if found else None


def run(benchmark: Benchmark) -> tuple[list[Line], int]:
    """Its figures, which are also printed as they come, and its exit status."""
    command = [sys.executable, "-u", str(HERE / benchmark.script), *benchmark.arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            print(text, end="", flush=True)
            line = parse(text.rstrip("\n"))
            lines += [line] if line else []
    return lines, process.returncode


def rows(benchmark: Benchmark, lines: list[Line], status: int) -> list[str]:
    """Its part of the table; a script that failed otherwise than by a missed bound has a row that says so."""
    if status and not any(line.verdict == "FAIL" for line in lines):
        lines = [*lines, Line("FAIL", "the script itself", f"ended with {status}")]
    cells = [[f"`{benchmark.script}`", line.name, line.figure, line.verdict] for line in lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def machine() -> str:
    """The machine, as far as it can be told; no name of a host."""
    from importlib.metadata import version

    python = platform.python_version()
    return f"{os.cpu_count()} cores, {platform.machine()}; Python {python}, jax {version('jax')}."


def main() -> int:
    table, statuses = ["| benchmark | what | figure | bound |", "| --- | --- | --- | --- |"], []
    for benchmark in BENCHMARKS:
        if benchmark.compares and not COMPARATORS.exists():
            print(f"{benchmark.script}: not run; `make comparators` installs what it compares with", flush=True)
            table.append(f"| `{benchmark.script}` | not run | needs `make comparators` | |")
            continue
        print(f"--- {' '.join((benchmark.script, *benchmark.arguments))}", flush=True)
        started = time.perf_counter()
        lines, status = run(benchmark)
        print(f"--- {time.perf_counter() - started:.0f} s", flush=True)
        table += rows(benchmark, lines, status)
        statuses.append(status)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(f"{machine()}\n\n" + "\n".join(table) + "\n")
    print(TABLE.read_text())
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
