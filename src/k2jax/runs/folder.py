"""The run directory: the names of what is in it, its config, and the lock that keeps other processes out."""

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k2jax.config import Config
from k2jax.errors import RunFailed, UserError
from k2jax.files import locked, read_json, read_small, unsealed, write_sealed

_EDITED = "give changes as options of `k2jax train`, and restore the file from a copy"


class _Inside:
    """An attribute of a RunFolder: the path of this name in it."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """A run directory, with the paths of everything that a run leaves there. None of them need exist."""

    path: Path

    config = _Inside("config.json")  # makes a folder a run directory
    run = _Inside("run.json")  # its number: runs/identity.py
    lock = _Inside("lock")
    timeline = _Inside("timeline.json")  # its segments: data/loader/timeline.py
    tokenizer = _Inside("tokenizer")  # folder; absent where no tokenizer is known
    env = _Inside("env.txt")  # versions
    checkpoints = _Inside("checkpoints")  # folder of the committed steps: runs/commits.py
    arrays = _Inside("arrays")  # folder of the arrays of steps that were saved to a bucket
    rewound = _Inside("rewound")  # folder of what rewinds took back: runs/rewind.py
    rewinds = _Inside("rewinds.jsonl")  # a record per rewind
    damaged = _Inside("damaged")  # folder to which damaged ones are moved
    metrics = _Inside("metrics.jsonl")  # a record per step: runs/records.py
    time = _Inside("time.jsonl")  # an account of each start's seconds: runs/goodput.py
    ledger = _Inside("ledger.jsonl")  # a record per replaced row
    tensorboard = _Inside("tb")  # folder
    ranks = _Inside("ranks")  # folder of the processes' logs and last words
    curves = _Inside("curves.png")
    sample = _Inside("sample.txt")


def path_problem(folder: Path) -> str | None:
    """The rule that a run directory's path breaks: Orbax takes it for a glob pattern when it merges a save's files.

    With [ or \\ the path does not match itself, and the save, which seems to succeed, is unreadable. With * or ? it
    matches the folders of other runs too, whose unfinished saves would be merged into this one.
    """
    bad = [mark for mark in "[\\*?" if mark in str(folder.resolve())]
    if not bad:
        return None
    return f"{folder.resolve()} must not have {' or '.join(bad)}, below which checkpoints cannot be saved"


def write_config(folder: Path, config: Config) -> None:
    """Write config.json, which makes `folder` a run directory."""
    write_sealed(RunFolder(folder).config, config.to_json())


def is_published(folder: Path) -> bool:
    """True if `folder` is a published checkpoint: its config.json has a model_type, which a run's never has."""
    path = RunFolder(folder).config
    if not path.is_file():
        return False
    value = read_json(path, follow_links=True)  # a hub's cache is made of links
    return isinstance(value, dict) and "model_type" in value


def read_config(folder: Path) -> Config:
    """The config that a run was made with. UserError if `folder` is not a run directory, or the file was changed."""
    path = RunFolder(folder).config
    if not os.path.lexists(path):
        what = "is not a run directory (no config.json)" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}")
    if is_published(folder):
        raise UserError(f"{folder}: is a published checkpoint, not a run; `k2jax import {folder}` makes a run of it")
    return Config.from_json(path, unsealed(path, read_json(path), _EDITED))


_held: dict[Path, bytes] = {}  # content of the lock files that this process holds


def check_held(run_dir: Path) -> None:
    """Raise RunFailed if this process has held the run and another has taken it: it must write nothing more there.

    The operating system's lock does not tell: it stays with a file that was removed, and some network file systems give
    it to several hosts.
    """
    path = RunFolder(run_dir).lock.absolute()
    if path not in _held:
        return
    try:
        found = read_small(path)
    except UserError as error:
        raise RunFailed(f"{error}; the run may belong to another process by now, so this one writes nothing more") from None
    if found != _held[path]:
        owner = _owner(found)
        raise RunFailed(f"{path}: the run was taken over by process {owner}; this one writes nothing more")


def _owner(content: bytes) -> str:
    return content[:80].decode("ascii", "replace").partition("\n")[0].strip() or "unknown"


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process inside; the OS releases the lock when the process exits.

    Raises UserError if another process holds it, or if the directory cannot be written.
    """
    path = RunFolder(run_dir).lock
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(path, os.O_RDWR | os.O_CREAT))
            if descriptor is not None:
                os.truncate(descriptor, 0)
                content = f"{os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n".encode()
                os.write(descriptor, content)
                _held[path.absolute()] = content
                stack.callback(_held.pop, path.absolute())
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path}: is a symbolic link, which a run never makes; remove it") from None
            rule = f"cannot be written: {error.strerror}"
            raise UserError(f"train.run_dir = {str(run_dir)!r}: {rule}; make it writable, or give another") from None
        if descriptor is None:
            raise UserError(f"{run_dir}: in use by process {_owner(read_small(path))}; wait for it or give another train.run_dir")
        yield
