"""Compiled programs on the disk: a run that starts again, after a stop or a fault, does not compile its step again.

JAX's persistent cache, whose keys hold all that a program depends on: the computation, the versions, the devices and
the compiler's flags. What compiles in less than a second is not kept.
"""

import contextlib
import threading
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from k2jax.config import TrainConfig
from k2jax.errors import UserError
from k2jax.runs.mirror import run_folder


@contextlib.contextmanager
def compile_cache(config: TrainConfig) -> Iterator[None]:
    """Programs compiled inside come from, and go to, `config.compile_cache`, seen from the run directory.

    A folder that JAX was given itself (JAX_COMPILATION_CACHE_DIR) comes first. Of a run in a bucket a folder that is seen
    from the run directory lasts as long as the process: an absolute one is needed to keep programs. Raises UserError if the folder
    cannot be made.
    """
    if config.compile_cache is None or jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    folder = (run_folder(config.run_dir).path / config.compile_cache).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        name = f"train.compile_cache = {config.compile_cache!r}"
        raise UserError(f"{name}: {folder} cannot be made: {error.strerror}; give another, or none") from None
    _use(str(folder))
    try:
        yield
    finally:
        _use(None)


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX looks at the folder once, at the first program that it compiles


@contextlib.contextmanager
def cache_notes(thread: int) -> Iterator[list[str]]:
    """Afterwards the list says whether the one program that `thread` compiled inside was found in the cache."""
    notes, hits = [], []

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield notes
    finally:
        jax.monitoring.unregister_event_listener(listen)
    if folder := jax.config.jax_compilation_cache_dir:
        notes.append(f"{'found in' if hits else 'not in'} the cache, {folder}")
