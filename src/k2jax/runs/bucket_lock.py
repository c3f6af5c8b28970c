"""The lock of a run in a bucket: an object with its holder and a count that goes up while the holder lives. Needs no jax.

Every change is a conditional write, which one of several writers wins. No clock is compared: who finds the lock taken
watches the count by a clock of its own, and takes the lock over when the count has stood still for SILENT_SECONDS. A
holder that was only slow finds out at its next renewal, without which it commits nothing.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from k2jax.errors import RunFailed, UserError
from k2jax.storage import Folder

RENEW_SECONDS = 10.0
SILENT_SECONDS = 60.0


def _parse(content: bytes | None) -> dict:
    """The values of a lock; {} for none, or one that cannot be read, which is watched like any other."""
    with contextlib.suppress(ValueError):
        value = json.loads(content or b"{}")
        return value if isinstance(value, dict) else {}
    return {}


def _owner(lock: dict) -> str:
    return f"{lock.get('pid', 'unknown')} on {lock.get('host', 'an unknown host')}"


def _may_take(bucket: Folder, name: str, content: bytes | None, version: bytes) -> bytes | None:
    """The version of a lock that can be taken: there is none, it was given back, or it has stood still. None: it lives."""
    if content is None or _parse(content).get("released"):
        return version
    print(f"{bucket.url}/{name}: held by process {_owner(_parse(content))}; watching for up to "
          f"{SILENT_SECONDS:g} s whether it lives", file=sys.stderr, flush=True)  # fmt: skip
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(RENEW_SECONDS / 5)
        now, other = bucket.read_version(name)
        if other != version:
            return other if now is None or _parse(now).get("released") else None
    return version


class BucketLock:
    """A lock that this process holds, renewed in the background."""

    def __init__(self, bucket: Folder, name: str, version: bytes):
        """Take the lock whose version is `version`. UserError if another was quicker."""
        began = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.holder = {"host": socket.gethostname(), "pid": os.getpid(), "began": began, "id": secrets.token_hex(8)}
        self._bucket, self._name, self._count, self._version = bucket, name, 0, version
        self._mutex, self._ended, self._released = threading.Lock(), threading.Event(), False
        if not self._write({}):
            raise in_use(bucket, name)
        threading.Thread(target=self._keep, name="lock", daemon=True).start()

    def _write(self, more: dict) -> bool:
        content = json.dumps(self.holder | {"count": self._count} | more).encode()
        written = self._bucket.write_if(self._name, content, self._version)
        if written is not None:
            self._count, self._version = self._count + 1, written
        return written is not None

    def renew(self) -> None:
        """Prove that the lock is still held. RunFailed if it is not; UserError if the bucket is silent."""
        with self._mutex:
            if self._released:
                raise RunFailed(f"{self._bucket.url}: this process has given it back and commits nothing more")
            if not self._write({}):
                self._ended.set()
                other = _owner(_parse(self._bucket.read_version(self._name)[0]))
                rule = "it had seen no life of this one; this process commits nothing more"
                raise RunFailed(f"{self._bucket.url}: was taken over by process {other}: {rule}")

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(UserError, RunFailed):  # the next commit will find out
                self.renew()

    def release(self) -> None:
        """Give it back, if it is still held; once."""
        self._ended.set()
        with self._mutex, contextlib.suppress(UserError):  # who comes next then waits until it has stood still
            if not self._released:
                self._released = True
                self._write({"released": True})


def in_use(bucket: Folder, name: str) -> UserError:
    """The error of who finds the lock taken."""
    owner = _owner(_parse(bucket.read_version(name)[0]))
    return UserError(f"{bucket.url}: in use by process {owner}; wait for it or give another train.run_dir")


@contextlib.contextmanager
def hold(bucket: Folder, name: str) -> Iterator[BucketLock]:
    """Hold the lock inside. UserError if another process holds it and lives."""
    version = _may_take(bucket, name, *bucket.read_version(name))
    if version is None:
        raise in_use(bucket, name)
    lock = BucketLock(bucket, name, version)
    try:
        yield lock
    finally:
        lock.release()
