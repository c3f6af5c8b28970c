"""The processes of a run: which of them this is, and what they tell one another through jax.distributed's store.

Nothing here uses a device, so it works before the first collective, and while one hangs. In a process that is alone
every function returns at once. Each process calls them in the same order, and only then: the store's names are
numbered by the calls before.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from k2jax.errors import RunFailed, UserError, exit_code

PATIENCE = 300  # seconds that the others wait for one that is late: a slow disk, a long compile
WORK_PATIENCE = 86_400  # for one that works alone, on an index of all stores, say; they hear at once if it fails
_SHARE_SECONDS = 10
_FAILURE = "k2jax/failure"
_client = None  # of jax.distributed, which has no public way to its store
_index, _count = 0, 1
_calls: Counter[str] = Counter()
_watcher: threading.Thread | None = None
_told = threading.Event()  # that another process failed, so that this one ends
_last_words: Path | None = None
_STOP = "k2jax/stop"
_stopper: threading.Thread | None = None
_answerers: list[threading.Thread] = []
_stopping = threading.Condition()  # guards what follows
_polled = -1  # steps done when `stop_is_due` was last asked, and had not heard of a stop
_asked = False  # by a process, to stop
_stop_step: int | None = None  # steps done at the common end
_share_last_words: Callable[[], None] | None = None


def index() -> int:
    """The number of this process, from 0."""
    return _index


def count() -> int:
    """Processes of the run; 1 if this one is alone."""
    return _count


def is_first() -> bool:
    """True in the one process that writes what all have in common."""
    return _index == 0


def is_joined() -> bool:
    """True if jax.distributed connects the processes, even if there is only one."""
    return _client is not None


def _key(name: str) -> str:
    _calls[name] += 1
    return f"k2jax/{name}/{_calls[name]}"


def barrier(name: str, seconds: float = PATIENCE) -> None:
    """Return when every process has come here. RunFailed with those that did not in time."""
    if _client is None:
        return
    try:
        _client.wait_at_barrier(_key(name), int(seconds * 1000))
    except Exception as error:  # its text names those that are missing
        raise RunFailed(f"{name}: not every process came within {seconds:g} s: {error}") from None


def _by_process(entries: list[tuple[str, str]]) -> dict[int, object]:
    """The values of a folder of the store, whose names are the numbers of processes."""
    return {int(name.rpartition("/")[2]): json.loads(text) for name, text in entries}


def gather(name: str, value: object, seconds: float = PATIENCE) -> list:
    """The JSON values that the processes give, in their order. RunFailed if one gives none in time."""
    if _client is None:
        return [value]
    key = _key(name)
    _client.key_value_set(f"{key}/{_index}", json.dumps(value))
    barrier(name, seconds)
    values = _by_process(_client.key_value_dir_get(f"{key}/"))  # one call, whatever the number of processes
    barrier(name, seconds)
    _client.key_value_delete(f"{key}/{_index}")  # a run of months gathers often
    if missing := [str(number) for number in range(_count) if number not in values]:
        raise RunFailed(f"{name}: the store has lost the values of processes {', '.join(missing)}")
    return [values[number] for number in range(_count)]


def on_first(name: str, function: Callable[[], object], seconds: float = WORK_PATIENCE):
    """The JSON value that `function` returns in the first process, where alone it runs; its UserError or RunFailed, on all."""
    if _client is None:
        return function()
    outcome = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except (UserError, RunFailed) as error:
            kind, arguments = ("UserError", error.problems) if isinstance(error, UserError) else ("RunFailed", error.args)
            outcome = {"raised": kind, "arguments": arguments}
    outcome = gather(name, outcome, seconds)[0]
    if "raised" in outcome:
        raise {"UserError": UserError, "RunFailed": RunFailed}[outcome["raised"]](*outcome["arguments"])
    return outcome["value"]


def _await(key: str) -> str | None:
    """The value of `key` as soon as there is one, however late; None when the processes have parted."""
    while True:
        try:
            return _client.blocking_key_value_get(key, 3_600_000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return None  # the client was shut down


def ask_to_stop() -> None:
    """Let `stop_is_due` become true, in all processes; returns at once. In any thread."""
    with contextlib.suppress(Exception):  # another was first
        _client.key_value_set(_STOP, str(_index))


def _agree_on_stop(say_step: Callable[[int], None]) -> None:
    global _asked, _stop_step
    if _await(_STOP) is None:
        return
    with _stopping:
        _asked, polled = True, _polled  # from here on `stop_is_due` waits for the others' numbers
    try:
        steps = gather("stop", polled)
    except Exception:  # `stop_is_due` tells, if this process still comes there
        return
    with _stopping:
        _stop_step = max(steps) + 1  # none has begun the step after that
        _stopping.notify_all()
    say_step(_stop_step)


def watch_for_stop(say_step: Callable[[int], None]) -> None:
    """Begin to listen for `ask_to_stop`; of many processes in each.

    say_step(step): called in a thread as soon as the common end is known, the number of steps that will then be done,
    0 if none has begun.
    """
    global _stopper
    _stopper = threading.Thread(target=_agree_on_stop, args=(say_step,), name="stop", daemon=True)
    _stopper.start()


def stop_is_due(step: int) -> bool:
    """True in all processes at the same `step`, soon after one of them has called `ask_to_stop`.

    step: steps done. To be called once before every step. RunFailed if a process does not answer.
    """
    global _polled
    with _stopping:
        if not _asked:
            _polled = step
            return False
        if not _stopping.wait_for(lambda: _stop_step is not None, PATIENCE):
            raise RunFailed(f"stop: not every process said within {PATIENCE} s which step it is in")
        return step >= _stop_step


def publish(name: str, value: object) -> None:
    """Show a JSON value to the other processes, in place of the one before; waits for nobody."""
    if _client is not None:
        _client.key_value_set(f"k2jax/{name}-of/{_index}", json.dumps(value), allow_overwrite=True)


def published(name: str) -> dict[int, object]:
    """The newest values that the processes have shown, by process."""
    entries = [] if _client is None else _client.key_value_dir_get(f"k2jax/{name}-of/")
    return _by_process(entries)


def answer(name: str, make: Callable[[], object]) -> None:
    """Give the JSON value that `make` returns as soon as a process `ask`s for `name`, whatever the main thread does."""

    def wait() -> None:
        if _await(f"k2jax/{name}") is not None:
            with contextlib.suppress(Exception):  # the processes have parted
                _client.key_value_set(f"k2jax/{name}-answers/{_index}", json.dumps(make()))

    thread = threading.Thread(target=wait, name=name, daemon=True)
    _answerers.append(thread)
    thread.start()


def ask(name: str, seconds: float) -> dict[int, object]:
    """The values of all processes that `answer` within `seconds`, by process. Can be asked once in a run."""
    with contextlib.suppress(Exception):  # another was first
        _client.key_value_set(f"k2jax/{name}", str(_index))
    until, entries = time.monotonic() + seconds, []
    while len(entries) < _count and time.monotonic() < until:
        time.sleep(0.1)
        entries = _client.key_value_dir_get(f"k2jax/{name}-answers/")
    return _by_process(entries)


def keep_last_words(folder: Path, share: Callable[[], None] | None = None) -> None:
    """Let a process that fails write why into `folder`. share: brings it to where others can read it, where they cannot."""
    global _last_words, _share_last_words
    _last_words, _share_last_words = folder, share


def _share() -> None:
    with contextlib.suppress(Exception):  # a network may be why it fails
        _share_last_words()


def _write_last_words(text: str) -> None:
    if _last_words is None or _client is None:
        return
    with contextlib.suppress(OSError):  # a full disk may be why it fails
        _last_words.mkdir(exist_ok=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S %z")
        with open(_last_words / f"{_index}.failed", "a", encoding="utf-8") as file:
            file.write(f"{stamp} process {_index} of {_count}: {text}\n")
    if _share_last_words is not None:
        thread = threading.Thread(target=_share, name="last words", daemon=True)
        thread.start()
        thread.join(_SHARE_SECONDS)


def say(text: str) -> None:
    """A line on standard error, if that takes one."""
    with contextlib.suppress(OSError):  # so may a terminal or a reader of the output that has gone
        print(f"k2jax: {text}", file=sys.stderr)


def _end(code: int) -> NoReturn:
    """End without Python's and jax's clean-up, which would wait for processes that hang."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if is_first() and _client is not None:
        time.sleep(2)  # the store lives here: without it the others abort before they have read why
    os._exit(code)


def _watch() -> None:
    """End this process as soon as another one says why it failed, whatever the main thread is waiting for."""
    failure = json.loads(_await(_FAILURE) or "null")
    if failure is None or failure["process"] == _index:
        return
    _told.set()
    text = f"process {failure['process']} failed: {failure['why']}"
    say(f"{text}; process {_index} ends with it")
    _write_last_words(text)
    _end(failure["code"])


def joined(client, index: int, count: int) -> None:
    """Take up the connection that jax.distributed has made."""
    global _client, _index, _count, _watcher
    _client, _index, _count = client, index, count
    _watcher = threading.Thread(target=_watch, name="failures", daemon=True)
    _watcher.start()


def fail(error: BaseException) -> NoReturn:
    """Say why this process fails, tell the others, and end it: they end within seconds, with the same exit code.

    Without any clean-up, from whatever thread.
    """
    why, code = str(error), exit_code(error)
    if isinstance(error, (UserError, RunFailed)):
        text = why
    else:
        if _told.wait(1):  # the failure of another shows here as a broken connection
            _watcher.join()  # it says why, and ends this process
        text, why = "".join(traceback.format_exception(error)), f"{type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # another was first
        _client.key_value_set(_FAILURE, json.dumps({"process": _index, "why": why, "code": code}))
    say(f"process {_index}: {text}" if _count > 1 else text)  # after the others know: a terminal or disk may take no more, and wait
    _write_last_words(text)
    _end(code)


def leave() -> None:
    """Part from the others at a common end; returns when all have come. An interpreter that just ends may abort."""
    global _client, _index, _count, _watcher, _stopper, _polled, _asked, _stop_step
    if _client is None:
        return
    import jax

    jax.distributed.shutdown()
    for thread in filter(None, (_watcher, _stopper, *_answerers)):
        thread.join()
    _answerers.clear()
    _client, _index, _count, _watcher = None, 0, 1, None
    _stopper, _polled, _asked, _stop_step = None, -1, False, None
