"""Costs of a preparation, and that it survives kills: python benchmarks/prepare.py FOLDER [--megabytes 60]

Takes text that every machine with Python has (the standard library, installed packages, man pages), trains a vocabulary
in Kimi's format on it, and prepares it several times inside FOLDER:
- the rate of every task in MB of text per CPU second, of tokenise-and-write (tasks write and merge) at least 3;
- SIGKILL at five random moments, and the resumed store byte for byte that of a preparation that was never killed;
- the same manifest from this process, from two of datatrove's workers and, where Ray is installed, from Ray.
Rates are per second of CPU time, so that other load does not change them. Exits with 1 where one of these fails.
"""

import argparse
import base64
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

from k2jax.data.text.readers import records
from k2jax.data.text.sources import Tally, find_files
from k2jax.data.text.tasks import TASKS
from k2jax.data.tokenizer import train_bpe

LEAST_RATE = 3.0
PATTERN = "**/*.{py,pyi,md,rst,txt,gz}"


def gather(folder: Path, megabytes: int) -> list[str]:
    """Three sources as .jsonl files of about 4 MB, a third of the bytes each; one NAME=FOLDER for each."""
    sources = {
        "stdlib": sysconfig.get_path("stdlib"),
        "packages": sysconfig.get_path("purelib"),
        "man": "/usr/share/man",
    }
    specs = []
    for name, path in sources.items():
        skipped, left = Tally(), megabytes * 10**6 // 3
        target, number, size, lines = folder / "text" / name, 0, 0, []
        target.mkdir(parents=True)
        files = find_files([path], PATTERN, ("**/{site,dist}-packages/**",), skipped) if Path(path).is_dir() else []
        for file in random.Random(0).sample(files, len(files)):
            for record in records(file, "text", skipped, skipped):
                lines.append(json.dumps({"text": record.text}) + "\n")
                size += len(lines[-1])
            if size > 4 * 10**6 or size >= left:
                (target / f"{number:03}.jsonl").write_text("".join(lines))
                left, number, size, lines = left - size, number + 1, 0, []
            if left <= 0:
                break
        specs.append(f"{name}={target}")
        print(f"source {name}: {sum(p.stat().st_size for p in target.iterdir()) / 1e6:.1f} MB", flush=True)
    return specs


def write_tiktoken(path: Path, texts, vocab: int) -> int:
    """A file in Kimi's format with up to `vocab` ranks, from a byte-level BPE trained on `texts`; the ranks it has."""
    model = json.loads(train_bpe(texts, vocab).definition)["model"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in model["merges"]:
        token = bytes(letters[character] for part in pair for character in part)
        ranks.setdefault(token, len(ranks))
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return len(ranks)


CHILD = """
import json, sys
from k2jax.data.text.prepare import prepare
if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    print("ready", flush=True)
    print(json.dumps(prepare(**options)), flush=True)
"""


class Runner:
    """Preparations of the same text, each in a process of its own."""

    def __init__(self, folder: Path, specs: list[str], tokenizer: Path):
        self.folder, self.script = folder, folder / "child.py"
        self.script.write_text(CHILD)
        self.options = {"source": specs, "tokenizer": str(tokenizer), "near_duplicates": 0.8, "rank_bytes": 8 * 10**6}

    def start(self, out: str, **options) -> subprocess.Popen:
        values = {**self.options, "out": str(self.folder / out), **options}
        command = [sys.executable, str(self.script), json.dumps(values)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        return child

    def run(self, out: str, **options) -> tuple[dict, float]:
        """(summary, seconds)"""
        started = time.monotonic()
        output, _ = self.start(out, **options).communicate()
        return json.loads(output.splitlines()[-1]), time.monotonic() - started


def show_rates(name: str, tasks: dict) -> None:
    """Print MB per CPU second of each task and part."""
    print(f"\n{name:10} {'MB':>8} {'CPU s':>8} {'MB/CPU s':>9}")
    for task, cost in tasks.items():
        size, seconds = cost["text_bytes"] / 1e6, cost["cpu_seconds"]
        print(
            f"{task:10} {size:8.1f} {seconds:8.2f} {size / seconds:9.1f}"
            if size
            else f"{task:10} {'':8} {seconds:8.2f}"
        )
        for part, taken in cost["parts"].items():
            print(f"  {part:16} {taken:10.2f} {size / max(taken, 1e-9):9.1f}")


def all_bytes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kill_and_resume(runner: Runner, seconds: float, rng: random.Random) -> int:
    """Times that SIGKILL found the two-worker preparation of "killed" at work before it was left to end."""
    kills = 0
    for _ in range(5):
        child = runner.start("killed", workers=2)
        time.sleep(rng.uniform(0.12, 0.28) * seconds)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
        folder = runner.folder / ".killed.k2jax-partial"
        done = {p.name: sum(c.suffix != ".tmp" for c in p.iterdir()) for p in folder.iterdir() if p.is_dir()}
        print("killed; results so far:", {name: done[name] for name in TASKS if name in done}, flush=True)
    runner.run("killed", workers=2)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for text, vocabulary and stores")
    parser.add_argument("--megabytes", type=int, default=60, help="of text (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=65_536, help="ranks of the vocabulary (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    specs = gather(args.folder, args.megabytes)
    files = find_files(specs, "**/*", (), Tally())
    texts = (record.text for file in files[::3] for record in records(file, "text", Tally(), Tally()))
    ranks = write_tiktoken(args.folder / "k2.tiktoken", texts, args.vocab)
    print(f"vocabulary: {ranks:,} ranks in Kimi's format")
    runner, failures = Runner(args.folder, specs, args.folder / "k2.tiktoken"), []
    one, _ = runner.run("one")
    show_rates("all text", one["tasks"])
    written = one["tasks"]["write"]["cpu_seconds"] + one["tasks"]["merge"]["cpu_seconds"]
    rate = one["tasks"]["write"]["text_bytes"] / 1e6 / written
    for kind in ("repetition", "quality"):  # each alone: what the one leaves out, the other would not see
        filtered, _ = runner.run(kind, filters=[kind], validation_fraction=0.5)
        show_rates(kind, {"read": filtered["tasks"]["read"]})
    print(f"\ntokenise-and-write: {rate:.1f} MB per CPU second (at least {LEAST_RATE})")
    if rate < LEAST_RATE:
        failures.append("tokenise-and-write is too slow")
    two, seconds = runner.run("two", workers=2)
    print(f"two workers: {seconds:.1f} s in all, manifest {two['digest'][:16]}, alone {one['digest'][:16]}")
    same = all_bytes(args.folder / "one") == all_bytes(args.folder / "two")
    if not same or two["digest"] != one["digest"]:
        failures.append("two workers give another store")
    kills = kill_and_resume(runner, seconds, random.Random(time.time_ns()))
    identical = all_bytes(args.folder / "killed") == all_bytes(args.folder / "one")
    print(f"SIGKILL {kills} of 5 times at work; resumed store {'is' if identical else 'IS NOT'} byte-identical")
    if kills < 5 or not identical:
        failures.append("killed and resumed")
    if find_spec("ray"):
        os.environ["RAY_AUTH_MODE"] = "disabled"
        options = {"mem_per_cpu_gb": "0.5"}
        ray, seconds = runner.run("ray", executor="ray", workers=2, executor_options=options)
        print(f"Ray: {seconds:.1f} s in all, manifest {ray['digest'][:16]}")
        if ray["digest"] != one["digest"]:
            failures.append("Ray gives another manifest")
    print("all held" if not failures else f"FAILED: {'; '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
