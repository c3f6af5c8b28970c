"""Files that survive a crash: written whole under another name, synced, then renamed. Imports nothing of ours."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from k2jax.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment the old or the new content is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_url(path: str | Path) -> bool:
    """Of a Path too, which has one slash where the URL that it was made of has two."""
    return "://" in path if isinstance(path, str) else bool(re.match("[a-z0-9+.-]{2,}:/", str(path)))


_MARK = ".k2jax"  # tells what an earlier, killed command of ours left from a folder of the user's


def _remove(aside: Path) -> None:
    """Remove a folder of ours; the mark goes last, so that whatever is left at any moment is still known as ours."""
    for entry in aside.iterdir():
        if entry.name == _MARK:
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (aside / _MARK).unlink(missing_ok=True)
    aside.rmdir()


def _remove_leftover(aside: Path) -> None:
    if not aside.exists():
        return
    if not (aside / _MARK).exists() and any(aside.iterdir()):
        raise UserError(f"{aside}: is in the way and not ours; move it away")
    _remove(aside)


def must_be_new(target: str | Path) -> None:
    """UserError where `target` is no place for a new folder."""
    if is_url(target):
        raise UserError(f"--to {str(target)!r}: must be a folder, no URL; copy it there when it is made")
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; give another --to, or move it away")


@contextlib.contextmanager
def whole_folder(target: Path, word: str) -> Iterator[Path]:
    """Give a folder TARGET.WORD to be filled, which becomes `target` at the end, or is gone after an error.

    Raises UserError as `must_be_new` does, or where the disk does not take it.
    """
    must_be_new(target)
    aside = target.with_name(f"{target.name}.{word}")
    try:
        _remove_leftover(aside)
        aside.mkdir(parents=True)
        (aside / _MARK).touch()
        try:
            yield aside
            aside.rename(target)
            (target / _MARK).unlink()
            sync_folder(target.parent)
        finally:
            if aside.exists():
                _remove(aside)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
