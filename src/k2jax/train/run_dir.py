"""The run directory: its lock, and metrics.jsonl."""

import fcntl
import json
import os
from pathlib import Path

from k2jax.config import Config, UserError
from k2jax.files import write_atomic


def read_config(folder: Path) -> Config:
    """The config that a run was made with. Raises UserError where `folder` is no run directory."""
    stored = folder / "config.json"
    if not stored.exists():
        what = "is no run directory (it has no config.json)" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}")
    text = stored.read_text(encoding="utf-8")
    if '"model_type"' in text:
        raise UserError(f"{folder}: is a published checkpoint, no run; `k2jax import {folder}` makes one of it")
    return Config.from_json(text)


def lock_run(run_dir: Path):
    """Hold the run directory for this process until the returned file is closed; the kernel frees it when we die.

    Raises UserError where another process holds it.
    """
    file = open(run_dir / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(f"{run_dir}: in use by process {owner}; wait for it or give another train.run_dir") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class MetricsFile:
    """metrics.jsonl: one record per step, each exactly once, whatever the run went through."""

    def __init__(self, path: Path, first_step: int):
        """Keep the records of steps before `first_step` (a resumed run does the later ones again), drop the rest."""
        kept = [line for record, line in read_records(path) if record["step"] < first_step]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all records to the disk; done before a checkpoint that counts their steps as past."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[tuple[dict, str]]:
    """(record, line) of each complete line; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(json.loads(line), line) for line in lines[:-1]]
