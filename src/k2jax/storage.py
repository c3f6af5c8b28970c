"""A folder on a local disk, `gs://`, `s3://` or any other place that TensorStore reaches, by its path or URL.

Credentials are those of the environment: GOOGLE_APPLICATION_CREDENTIALS, AWS_PROFILE and the like; AWS_ENDPOINT_URL
names another service that speaks S3. A place that does not answer is a UserError after half a minute, or two where it
takes connections and is silent.
"""

import functools
import hashlib
import os
import shutil
from pathlib import Path

import tensorstore

from k2jax.errors import UserError
from k2jax.files import is_url, sha256_of, write_atomic

_DRIVERS = "gcs", "http", "s3"
# TensorStore would try 32 times, up to 32 s apart, and wait minutes for a connection and for ever for an answer.
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
# Tokens are read in the middle of runs, which a server's outage of minutes should not end: TensorStore's own.
PATIENT = {f"{driver}_request_retries": {} for driver in _DRIVERS}
_PATIENCE = {"CONNECT_TIMEOUT_SECONDS": "5", "LOW_SPEED_TIME_SECONDS": "15", "LOW_SPEED_LIMIT_BYTES": "1"}


@functools.cache
def shared_context() -> tensorstore.Context:
    """One for the process: `memory://` folders live in it, and connections are shared."""
    for name, value in _PATIENCE.items():  # of the process alone: no context holds them; what a user has set stays
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", value)
    return tensorstore.Context({f"{driver}_request_retries": _RETRIES for driver in _DRIVERS})


def _is_local(url: str) -> bool:
    return not is_url(url) or url.startswith("file://")


def _below(prefix: str) -> tensorstore.KvStore.KeyRange:
    return tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")  # "0" comes after "/"


def _variable(*names: str) -> str | None:
    """The first environment variable of `names` that is not empty."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def _remote_spec(url: str) -> dict:
    """TensorStore's s3 driver does not look for a service other than Amazon's where the AWS SDKs do."""
    spec = tensorstore.KvStore.Spec(url).to_json()
    if spec["driver"] == "s3" and (endpoint := _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")):
        spec["endpoint"] = endpoint.rstrip("/")
        if region := _variable("AWS_REGION", "AWS_DEFAULT_REGION"):  # else the server is asked, at Amazon's always
            spec["aws_region"] = region
    return spec


class Folder:
    """Files by their names inside the folder. UserError if the URL is none or the place does not answer."""

    def __init__(self, url, context: tensorstore.Context | None = None, patient: bool = False):
        """patient: try for many minutes where a place does not answer, as in the middle of a run."""
        self.url = str(url).rstrip("/")
        # A local folder is a Path too: its files are mapped and their sizes known without reading them.
        self.local = Path(self.url.removeprefix("file://")) if _is_local(self.url) else None
        try:
            spec = self.spec() | ({"context": PATIENT} if patient else {})
            self._files = tensorstore.KvStore.open(spec, context=context or shared_context()).result()
        except ValueError as error:
            raise UserError(f"{self.url}: is not a folder that can be opened: {error}") from None

    def __str__(self) -> str:
        return self.url

    def spec(self, name: str = "") -> dict:
        """TensorStore's kvstore spec of a folder inside this one."""
        inside = f"{name}/" if name else ""
        if self.local is not None:
            return {"driver": "file", "path": f"{self.local.resolve()}/{inside}"}  # it refuses ".."
        return _remote_spec(f"{self.url}/{inside}")

    def _wait(self, future, what: str):
        try:
            return future.result()
        except Exception as error:  # whatever the driver meets: permissions, networks, disks
            raise UserError(f"{self.url}/{what}: {error}") from None

    def names(self, prefix: str = "") -> list[str]:
        """Every file below `prefix`, which is "" or ends with a slash, sorted."""
        return sorted(name.decode() for name in self._wait(self._files.list(_below(prefix)), prefix))

    def names_between(self, first: str, end: str) -> list[str]:
        """Every file whose name is `first` or later, and before `end`, in the order of their bytes; end "": the last."""
        found = self._wait(self._files.list(tensorstore.KvStore.KeyRange(first, end)), first)
        return sorted(name.decode() for name in found)

    def read(self, name: str) -> bytes:
        """FileNotFoundError where there is none."""
        result = self._wait(self._files.read(name), name)
        if result.state != "value":
            raise FileNotFoundError(f"{self.url}/{name}")
        return result.value

    def has(self, name: str) -> bool:
        """True if there is such a file; its content is not read."""
        if self.local is not None:
            return (self.local / name).is_file()
        return self.names_between(name, f"{name}\0") == [name]

    def read_version(self, name: str, known: bytes | None = None) -> tuple[bytes | None, bytes]:
        """(content, version); None for the content where there is no such file, or where `known` is its version."""
        result = self._wait(self._files.read(name, if_not_equal=known), name)
        return (result.value if result.state == "value" else None), result.stamp.generation

    def write_if(self, name: str, content: bytes, version: bytes) -> bytes | None:
        """Write where `version` is still that of the file; the new version, None if it is not. Of several one wins.

        version: as `read_version` gave it. content: another for every writer and time, by which it knows its own.
        """
        written = self._wait(self._files.write(name, content, if_equal=version), name).generation
        if written:
            return written
        found, now = self.read_version(name)
        return now if found == content else None  # an answer that was lost: ours was written, and then tried again

    def write(self, name: str, content: str | bytes) -> None:
        """Atomic: a reader, or a crash, finds the old content or the new."""
        content = content.encode("utf-8") if isinstance(content, str) else content
        if self.local is None:
            self._wait(self._files.write(name, content), name)
        else:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.local / name, content)

    def remove(self, prefix: str) -> None:
        """All files below `prefix`, which is "" or ends with a slash."""
        if self.local is not None:
            shutil.rmtree(self.local / prefix, ignore_errors=True)  # unfinished files of a killed writer too
        else:
            self._wait(self._files.delete_range(_below(prefix)), prefix)

    def delete(self, name: str) -> None:
        """One file, if it is there."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        else:
            self._wait(self._files.write(name, None), name)

    def describe(self, name: str) -> dict:
        """{"bytes", "sha256"} of a file's content. FileNotFoundError where there is none."""
        if self.local is not None:
            path = self.local / name
            return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        content = self.read(name)
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
