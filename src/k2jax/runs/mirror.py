"""A run at gs:// or s3://: its small files are in a folder of this process too, its mirror. Needs no jax.

The bucket is the truth: a mirror is made of it when a run is opened, and removed when the process ends. What a run
appends to is appended in the mirror and uploaded at each save, before the commit record. Arrays are in the bucket alone.
"""

import atexit
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from k2jax.errors import RunFailed, UserError
from k2jax.files import is_url, write_atomic
from k2jax.runs.bucket_lock import BucketLock, hold
from k2jax.runs.folder import RunFolder, is_published, lock_run
from k2jax.storage import Folder

_NAMES = RunFolder(Path())
_TEXTS = (_NAMES.config, _NAMES.run, _NAMES.timeline, _NAMES.env, _NAMES.metrics, _NAMES.time, _NAMES.ledger)
_EXTRAS = (_NAMES.curves, _NAMES.sample)  # made at the end of a run, read by people
# Nothing that leads out of the mirror, whoever wrote the bucket.
_FETCHED = re.compile(rf"{_NAMES.tokenizer.name}/\w[\w.-]*|({_NAMES.checkpoints.name}|{_NAMES.damaged.name})/[0-9]+\.json")


class Mirror:
    """The mirror of one run, at `path`. lock: while this process holds the run's. writer: of those who hold it together."""

    def __init__(self, url: str):
        self.bucket, self._patient = Folder(url), Folder(url, patient=True)
        root = tempfile.mkdtemp(prefix="k2jax-mirror-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        self.path = Path(root, url.replace("://", ":/"))
        self.path.mkdir(parents=True)
        self.lock: BucketLock | None = None
        self.writer = ""
        self._versions: dict[str, bytes] = {}
        self._sent: dict[str, tuple[int, int]] = {}

    def name_of(self, path: Path) -> str:
        """The name in the bucket of a path in the mirror."""
        return path.relative_to(self.path).as_posix()

    def folder(self, folder: Path) -> Folder:
        """The folder in the bucket of a folder in the mirror, to write and read arrays there, patiently."""
        return Folder(f"{self.bucket.url}/{self.name_of(folder)}", patient=True)

    def _stamp(self, name: str) -> tuple[int, int]:
        found = (self.path / name).stat()
        return found.st_size, found.st_mtime_ns

    def _fetch_one(self, name: str) -> None:
        """Fetch an object that has changed, and remove what the mirror has of one that is not there any more."""
        path = self.path / name
        known = self._versions.get(name) if path.exists() else None
        content, version = self.bucket.read_version(name, known)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
            self._versions[name], self._sent[name] = version, self._stamp(name)
        elif version != known:
            path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Every object but those of arrays, which are hundreds of thousands and would take minutes to list."""
        arrays = _NAMES.arrays.name
        return [*self.bucket.names_between("", f"{arrays}/"), *self.bucket.names_between(f"{arrays}0", "")]  # "0" follows "/"

    def saves(self) -> list[str]:
        """Names of the folders of arrays, STEP-WRITER, of finished and unfinished saves."""
        return sorted({name.split("/")[1] for name in self.bucket.names(f"{_NAMES.arrays.name}/")})

    def fetch(self) -> None:
        """Make the small files in the mirror, but for logs and pictures, those of the bucket."""
        texts = {path.name for path in _TEXTS}
        for name in texts:
            self._fetch_one(name)
        there = {*self.names()}
        # TensorStore's gcs driver takes a refusal for the end of a list, and a run without its steps would begin again.
        if any((self.path / name).exists() for name in texts - there):
            raise UserError(f"{self.bucket.url}: its files cannot be listed; give the credentials the right to do so")
        mine = {self.name_of(path) for path in self.path.rglob("*") if path.is_file()}
        for name in sorted((mine | there) - texts):
            if _FETCHED.fullmatch(name):
                self._fetch_one(name)

    def fetch_record(self, path: Path) -> None:
        """Fetch a commit record that another process may have written since."""
        if not path.exists():
            self._fetch_one(self.name_of(path))

    def upload(self) -> None:
        """Write to the bucket which small files were written here since the last time. RunFailed if the lock is lost."""
        if self.lock is not None:
            self.lock.renew()
        names = [path.name for path in (*_TEXTS, *_EXTRAS)]
        for folder in (_NAMES.tokenizer, _NAMES.tensorboard, _NAMES.ranks):
            names += sorted(self.name_of(p) for p in (self.path / folder).rglob("*") if p.is_file() and p.suffix != ".tmp")
        for name in names:
            path = self.path / name
            if path.is_file() and self._sent.get(name) != (stamp := self._stamp(name)):
                self._patient.write(name, path.read_bytes())
                self._sent[name] = stamp  # of before: what was appended while it was read goes with the next

    def commit(self, path: Path, text: str) -> None:
        """Write the commit record `text`, after all else. RunFailed if the lock is lost, or another has committed it."""
        self.upload()
        name = self.name_of(path)
        there, version = self._patient.read_version(name)
        if there is not None or self._patient.write_if(name, text.encode(), version) is None:
            writer = _writer_of(self.bucket.read_version(name)[0])
            raise RunFailed(f"{self.bucket.url}/{name}: {writer} has committed this step; this process leaves it so")
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)

    def move_record(self, path: Path, to: Path) -> None:
        """Move a commit record to where no step is looked for; its arrays stay where they are."""
        to.parent.mkdir(exist_ok=True)
        path.rename(to)
        self.bucket.write(self.name_of(to), to.read_bytes())
        self.bucket.delete(self.name_of(path))

    def remove_step(self, path: Path, arrays: Path | None) -> None:
        """Remove a step by its commit record, which goes first, and its folder of arrays."""
        self.bucket.delete(self.name_of(path))
        path.unlink(missing_ok=True)
        if arrays is not None:
            self.remove(arrays)

    def remove(self, folder: Path) -> None:
        """Remove all that is in the bucket in this folder of the mirror."""
        self.bucket.remove(f"{self.name_of(folder)}/")


def _writer_of(record: bytes | None) -> str:
    """In words, who wrote a commit record."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        writer = json.loads(record)["writer"]
        return f"process {writer['pid']} on {writer['host']}"
    return "another process"


_mirrors: dict[str, Mirror] = {}  # of this process, by URL


def mirror_of(path: Path) -> Mirror | None:
    """The mirror in which this path is; None for a run on a disk."""
    return next((mirror for mirror in _mirrors.values() if path.is_relative_to(mirror.path)), None)


def url_problem(url: str) -> str | None:
    """The rule that the URL of a run directory breaks."""
    if re.fullmatch(r"(gs|s3)://[a-z0-9][\w.-]*(/\w[\w.=+-]*)+/?", url, re.ASCII):
        return None
    return "must be gs://BUCKET/NAME or s3://BUCKET/NAME, of letters, digits and _ . = + -, or a folder on a disk"


def run_folder(place: str | Path) -> RunFolder:
    """The files of a run by its path or URL; of one at a URL those of its mirror, as far as they have been fetched.

    UserError if it is a URL at which no run can be.
    """
    if not is_url(place):
        return RunFolder(Path(place))
    url = re.sub(r"^(\w+:)/+", r"\1//", str(place)).rstrip("/")
    if url not in _mirrors:
        if rule := url_problem(url):
            raise UserError(f"{place}: {rule}")
        _mirrors[url] = Mirror(url)
    return RunFolder(_mirrors[url].path)


def open_run_folder(place: str | Path) -> RunFolder:
    """`run_folder` with what is in the bucket now. UserError if the bucket cannot be read."""
    files = run_folder(place)
    if (mirror := mirror_of(files.path)) is not None:
        mirror.fetch()
        if is_published(files.path):
            raise UserError(f"{place}: is a published checkpoint, not a run; copy it to a disk, and give its folder there")
    return files


@contextlib.contextmanager
def hold_run(folder: Path) -> Iterator[str]:
    """Hold the run for this process inside. Gives the id of the holder of one in a bucket, "" for one on a disk.

    Raises UserError if another process holds it, or if it cannot be written.
    """
    mirror = mirror_of(folder)
    if mirror is None:
        with lock_run(folder):
            yield ""
        return
    with hold(mirror.bucket, _NAMES.lock.name) as mirror.lock:
        try:
            yield mirror.lock.holder["id"]
        finally:
            mirror.lock = None


def join_run(folder: Path, writer: str) -> None:
    """In every process of a run, when the first holds it: see what it sees. writer: what `hold_run` gave there."""
    if (mirror := mirror_of(folder)) is not None:
        mirror.writer = writer
        mirror.fetch()


def shown(path: Path) -> str:
    """A path as a user knows it: that of something in a mirror by its URL."""
    mirror = mirror_of(path)
    return str(path) if mirror is None else f"{mirror.bucket.url}/{mirror.name_of(path)}".removesuffix("/.")


def entries_of(folder: Path) -> list[str]:
    """Names of everything at the top of a run directory, on a disk or in a bucket; [] where there is none."""
    if (mirror := mirror_of(folder)) is not None:
        return sorted({name.split("/")[0] for name in mirror.names()})
    return sorted(entry.name for entry in folder.glob("*"))


def upload(folder: Path) -> None:
    """Bring what was written in a mirror to its bucket; nothing for a run on a disk. Raises as `Mirror.upload`."""
    if (mirror := mirror_of(folder)) is not None:
        mirror.upload()


def leave_run(folder: Path) -> None:
    """Upload and give the lock back, in a process that ends at once. Raises as `Mirror.upload`."""
    if (mirror := mirror_of(folder)) is not None:
        mirror.upload()
        if mirror.lock is not None:
            mirror.lock.release()


@contextlib.contextmanager
def uploading(folder: Path) -> Iterator[None]:
    """`upload` at the end, also after an error, which is raised whatever the upload meets."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError, RunFailed):
            upload(folder)
        raise
    upload(folder)
