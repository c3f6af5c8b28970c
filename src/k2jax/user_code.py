"""Python files of the user: configs, and functions that make an optimizer."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def _beside(path: str) -> Iterator[None]:
    """Imports find the files beside `path` first, as under `python FILE`; what they import is forgotten afterwards.

    Two configs of two folders may each have a base.py, and one process may load both.
    """
    folder, before, known = str(Path(path).resolve().parent), list(sys.path), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder + "/"):
                del sys.modules[name]


def run_file(path: str) -> dict[str, object]:
    """The names that a Python file defines. Raises whatever its code raises."""
    with _beside(path):
        return runpy.run_path(path)


def call_beside(path: str, function) -> object:
    """function(), called where imports find the files beside `path`, as when the file itself ran."""
    with _beside(path):
        return function()


def error_line(path: str, error: Exception) -> str:
    """"FILE:LINE" of the last line of a user's file that took part in an exception; "FILE" if none did."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == Path(path).name]
    return f"{path}:{lines[-1]}" if lines else path


def describe_error(path: str, error: Exception) -> str:
    """An exception of a user's file, with the last line of that file that took part in it."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: SyntaxError: {error.msg}"
    return f"{error_line(path, error)}: {type(error).__name__}: {error}"
