"""The run directory: its lock, and metrics.jsonl."""

import fcntl
import os
from pathlib import Path

from k2jax.config import Config
from k2jax.errors import UserError


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
