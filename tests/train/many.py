"""Real processes on loopback that train one run together; each start is bounded in time and cleans up after itself."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compile_flags import COMPILE_FLAGS

from k2jax.launch.local import free_port

HERE = Path(__file__).parent
# Where the code under test is, if it is not the installed one.
_PATHS = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"XLA_FLAGS": COMPILE_FLAGS, "PYTHONPATH": _PATHS}


@dataclass(frozen=True)
class Ended:
    """The end of a run's processes. codes, outputs: in their order. seconds: from the first end to the last."""

    codes: list[int]
    outputs: list[str]
    seconds: float


def commands(count: int, devices: int, *arguments: str, event: str = "none") -> list[list[str]]:
    """The command line of each process: of one too by jax.distributed, and so with gloo; count 0: one alone, without."""
    driver = [sys.executable, str(HERE / "process_driver.py"), event, "train", str(HERE / "micro.py")]
    if count == 0:
        return [[*driver, "--simulate", str(devices), *arguments]]
    joined = ["--simulate", str(devices), "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    return [[*driver, *joined, "--process-id", str(number), *arguments] for number in range(count)]


def run(folder: Path, lines: list[list[str]], timeout: float = 500) -> Ended:
    """Start these commands in `folder` and wait for the end of all; none outlives the call."""
    files = [open(folder / f"output.{number}", "w+", encoding="utf-8") for number in range(len(lines))]
    started = [
        subprocess.Popen(line, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        for line, file in zip(lines, files, strict=True)
    ]
    first, deadline = None, time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in started):
            if first is None and any(process.poll() is not None for process in started):
                first = time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(Path(file.name).read_text() for file in files))
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for file in files:
            file.close()
    seconds = time.monotonic() - (first or time.monotonic())
    outputs = [Path(file.name).read_text(encoding="utf-8") for file in files]
    return Ended([process.returncode for process in started], outputs, seconds)


def train(folder: Path, count: int, devices: int, *arguments: str, event: str = "none") -> Ended:
    return run(folder, commands(count, devices, *arguments, event=event))


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def content(run_dir: Path, step: int) -> dict[str, str]:
    """The digests of a committed step's content."""
    return json.loads((run_dir / "checkpoints" / f"{step}.json").read_text())["content"]
