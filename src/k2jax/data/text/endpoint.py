"""Answers of an OpenAI-compatible endpoint, each asked for once: a cache on disk, bounded retries, timeouts, sizes.

The protocol: POST URL/chat/completions with {"model", "messages", "temperature", "seed"}, and the text in
choices[0].message.content. vLLM, SGLang, llama.cpp's server and hosted services speak it.
"""

import hashlib
import http.client
import json
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from k2jax.data.text.readers import parse_json
from k2jax.errors import RunFailed, UserError

_MAX_ANSWER_BYTES = 2**24
_LONGEST_PAUSE = 60.0  # seconds, also where the endpoint asks for more
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
_OF_THIS_TEXT = {400, 413, 422}  # such as one longer than the model's context


class Answer(NamedTuple):
    text: str
    finished: bool  # not cut off at the endpoint's limit of tokens


class NoAnswer(Exception):
    """The endpoint gave none within the retries, or refuses this one text."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another host."""

    def redirect_request(self, *arguments):
        return None


class _Cache:
    """Answers by the sha256 of what was asked, in one SQLite file that a kill cannot break. For many threads."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._execute("PRAGMA journal_mode = WAL")
            self._execute("CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except BaseException:
            self.database.close()
            raise

    def _damaged(self, reason: object) -> UserError:
        hint = "remove it, so that every answer is asked for again, or name another --out"
        return UserError(f"{self.path}: is not a file of answers as it was written ({reason}); {hint}")

    def _execute(self, statement: str, values: tuple = ()) -> tuple | None:
        """The first row. RunFailed if the disk or another process is in the way, UserError if the file is damaged."""
        try:
            with self.lock:
                return self.database.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:  # such as a full disk
            raise RunFailed(f"{self.path}: {error}; the same command continues from here") from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def get(self, asked: str) -> Answer | None:
        row = self._execute("SELECT answer FROM answers WHERE asked = ?", (asked,))
        if row is None:
            return None
        try:
            text, finished = parse_json(row[0])
            if not isinstance(text, str) or not isinstance(finished, bool):
                raise TypeError("an answer is a text and a boolean")
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None
        return Answer(text, finished)

    def put(self, asked: str, answer: Answer) -> None:
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (asked, json.dumps(answer)))


def _read(response, deadline: float) -> bytes:
    """The body; TimeoutError for one that drips beyond the deadline, ValueError for one without end."""
    body = b""
    while part := response.read1(2**16):
        body += part
        if len(body) > _MAX_ANSWER_BYTES:
            raise ValueError(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer did not end in time")
    return body


def _parse(body: bytes) -> Answer:
    choice = parse_json(body)["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"choices[0].message.content is {type(text).__name__}, not text")
    return Answer(text.encode("utf-8", "replace").decode(), choice.get("finish_reason") in (None, "stop"))


def _describe(error: urllib.error.HTTPError) -> str:
    with error:
        return f"{error.code} {error.reason}: {error.read(300).decode('utf-8', 'replace').strip()}"


class Endpoint:
    """`url` up to and with its version, as http://localhost:8000/v1; `key` goes into the Authorization header alone.

    timeout: seconds for one request; retries: further ones after a failure that may pass, with growing pauses.
    """

    def __init__(self, url: str, model: str, key: str | None, cache: Path, *, timeout: float, retries: int):
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.opener = urllib.request.build_opener(_Stay)
        self.cache = _Cache(cache)
        self.lock, self.num_requests, self.num_cached = threading.Lock(), 0, 0

    def close(self) -> None:
        self.cache.database.close()

    def ask(self, messages: list[dict], temperature: float, attempt: int = 0) -> Answer:
        """The answer to `messages`, from the cache if it was asked before; `attempt` counts re-asked ones.

        Raises UserError if the endpoint refuses for good (no such model, wrong key), else NoAnswer.
        """
        asked = {"model": self.model, "messages": messages, "temperature": temperature, "seed": attempt}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        if (answer := self.cache.get(key)) is not None:
            with self.lock:
                self.num_cached += 1
            return answer
        answer = self._request(json.dumps(asked).encode())
        self.cache.put(key, answer)
        return answer

    def _request(self, body: bytes) -> Answer:
        for retry in range(self.retries + 1):
            pause = min(0.5 * 2**retry, _LONGEST_PAUSE)
            with self.lock:
                self.num_requests += 1
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", body, self.headers)
                deadline = time.monotonic() + self.timeout
                with self.opener.open(request, timeout=self.timeout) as response:
                    return _parse(_read(response, deadline))
            except urllib.error.HTTPError as error:
                found, wanted = _describe(error), error.headers.get("Retry-After", "")
                if error.code in _OF_THIS_TEXT:
                    raise NoAnswer(f"{self.url}: answers {found}") from None
                if error.code not in _TRY_AGAIN:
                    raise UserError(f"--url {self.url}: answers {found}; correct --url, --model or the key") from None
                pause = min(float(wanted), _LONGEST_PAUSE) if wanted.isdigit() else pause
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                found = f"{type(error).__name__}: {error}"
            if retry < self.retries:
                time.sleep(pause)
        raise NoAnswer(f"{self.url}: no answer to {self.retries + 1} requests; the last: {found}")
