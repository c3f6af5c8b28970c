"""TokenIndex that do not answer are named, and not waited for."""

import os
import socket
import subprocess
import sys
import time

import pytest
import tensorstore

from k2jax import storage as module
from k2jax.data.store.reader import TokenStore
from k2jax.errors import UserError


@pytest.fixture
def closed():
    """The address of a port that is taken, but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def context(monkeypatch):
    """A new shared context, with the number of tries as it is and no time between them."""
    monkeypatch.setattr(module, "_RETRIES", module._RETRIES | {"initial_delay": "1ms", "max_delay": "1ms"})
    new = module.shared_context.__wrapped__()
    monkeypatch.setattr(module, "shared_context", lambda: new)
    return new


def test_an_unreachable_store_is_the_users_to_mend(closed, context):
    with pytest.raises(UserError, match=f"{closed}/store/manifest.json: .*All 6 retry attempts failed: .*connect"):
        TokenStore(f"{closed}/store")


def test_s3_gives_up_too(closed, context, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a"), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    place = {"driver": "s3", "bucket": "bucket", "aws_region": "us-east-1", "endpoint": closed}
    store = tensorstore.KvStore.open(place, context=context).result()
    with pytest.raises(ValueError, match="All 6 retry attempts failed"):
        store.read("manifest.json").result()


SILENT = """import sys
from k2jax import storage as folder
from k2jax.data.store.reader import TokenStore
folder._PATIENCE = dict.fromkeys(folder._PATIENCE, "1")
folder._RETRIES = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
try:
    TokenStore(sys.argv[1])
except folder.UserError as error:
    print(error)
"""


@pytest.mark.parametrize("backlog, why", [(0, "Connection timed out"), (9, "Operation too slow")])
def test_silence_is_no_answer(backlog, why):
    """A host that takes no connection, and one that takes it and says nothing. curl reads its limits once a process."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        for client in (first, second) if not backlog else ():
            client.setblocking(False)
            client.connect_ex(server.getsockname())  # the queue is full: the kernel drops whatever else knocks
        url, started = f"http://127.0.0.1:{server.getsockname()[1]}/store", time.monotonic()
        environment = {name: value for name, value in os.environ.items() if "CURL" not in name}
        command = [sys.executable, "-c", SILENT, url]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith(url) and why in said and time.monotonic() - started < 20
