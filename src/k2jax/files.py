"""Small files and folders that survive a crash, and that are not believed if anything in them has changed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from k2jax.errors import UserError


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError inside name `path` if it names no file, as that of a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_file(path: Path) -> None:
    """Make the content of a file durable, or the renames and removals inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment the old or the new content is there, whole.

    The content is written beside it under a name of its own, which must not exist and is no link that leads elsewhere.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of an earlier, killed process
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with naming(path), open(descriptor, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)


@contextlib.contextmanager
def locked(path: Path, flags: int) -> Iterator[int | None]:
    """Hold a file or folder for this process inside; the OS releases the lock when the process exits.

    Gives the descriptor of `path`, opened with `flags` and O_NOFOLLOW; None if another process holds it. OSError if it
    cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield descriptor if mine else None
    finally:
        os.close(descriptor)


SMALL_BYTES = 2**26  # no small file of ours is larger; one that is was not written by us


def read_small(path: Path, follow_links: bool = False) -> bytes:
    """The content of a small file. UserError if it is missing, not a file, a link, too large or unreadable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: is not a regular file; put the file itself there")
            content = file.read(SMALL_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a symbolic link; put the file itself there") from None
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > SMALL_BYTES:
        raise UserError(f"{path}: is larger than {SMALL_BYTES >> 20} MiB, too large for what it should be")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(where: str | Path, text: bytes, hint: str = "restore it from a copy") -> object:
    """The JSON value of `text`, which was read from `where`. UserError if it is not JSON or not UTF-8."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: is not JSON ({reason}); {hint}") from None


def read_json(path: Path, follow_links: bool = False) -> object:
    """The value of a small JSON file. UserError as `read_small` and `parse_json` raise it."""
    return parse_json(path, read_small(path, follow_links))


def _seal(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sealed(values: dict) -> dict:
    """`values`, which are JSON, with the digest of all of them, so that no bit of them can change unseen."""
    return values | {"sha256": _seal(values)}


def unsealed(where: str | Path, value: object, hint: str = "restore it from a copy") -> dict:
    """The values given to `sealed`. UserError if `value` is not an object, or its digest not that of its values."""
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
        raise UserError(f"{where}: must be an object that carries its own sha256; {hint}")
    values = {key: entry for key, entry in value.items() if key != "sha256"}
    try:
        found = _seal(values)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: cannot be checked ({error}); {hint}") from None
    if value["sha256"] != found:
        raise UserError(f"{where}: was changed: the sha256 of its values is {found}, it says {value['sha256']}; {hint}")
    return values


def read_sealed(path: Path, hint: str = "restore it from a copy") -> dict:
    """The values of a file written by `write_sealed`. UserError as `read_json` and `unsealed` raise it."""
    return unsealed(path, read_json(path), hint)


def write_sealed(path: Path, values: dict) -> None:
    """Replace `path` by `values` as JSON with their digest."""
    write_atomic(path, json.dumps(sealed(values), indent=2) + "\n")


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
    """UserError if `target` cannot be a new folder."""
    if is_url(target):
        raise UserError(f"--to {str(target)!r}: must be a folder, not a URL; copy it there when it is made")
    if str(target).startswith("~"):
        rule = f"must not begin with ~, which is not expanded here; nearest: {os.path.expanduser(target)!r}"
        raise UserError(f"--to {str(target)!r}: {rule}")
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
            sync_file(target.parent)
        finally:
            if aside.exists():
                _remove(aside)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
