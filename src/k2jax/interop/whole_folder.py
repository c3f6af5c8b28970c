"""A folder that appears whole or not at all, and that never takes the place of anything."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from k2jax.checks import is_url
from k2jax.config import UserError
from k2jax.files import sync_folder

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
