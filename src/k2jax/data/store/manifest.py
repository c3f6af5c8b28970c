"""The manifest of a token store, by which a reader notices missing, extra and damaged files."""

import io
import itertools
import threading
from collections.abc import Iterator

import numpy as np

from k2jax.errors import UserError
from k2jax.files import parse_json, unsealed
from k2jax.storage import Folder

FORMAT = 2
SPLITS = ("train", "validation")
SHARD_TOKENS, CHUNK_TOKENS = 2**24, 2**12
COUNTS = ("tokens", "documents", "text_bytes")
MEND = "restore the file from a copy, or prepare the store again"


class CorruptStore(UserError):
    """The store's files are not those that were written."""


def _check_types(manifest: dict) -> None:
    streams = [entry["splits"][split] for entry in manifest["sources"].values() for split in SPLITS]
    totals = [manifest["splits"][split] for split in SPLITS]
    parts = [part for stream in streams for part in stream["parts"]]
    counts = [item[key] for item in [*totals, *streams, *parts] for key in COUNTS] + [p["part"] for p in parts]
    counts += [manifest["shard_tokens"], manifest["chunk_tokens"], manifest["tokenizer"]["vocab_size"]]
    counts += [entry["bytes"] for entry in manifest["files"].values()]
    texts = [manifest["tokenizer"]["digest"], *(entry["sha256"] for entry in manifest["files"].values())]
    if {*map(type, counts)} != {int} or {*map(type, texts)} != {str} or min(counts) < 0:
        raise ValueError("a count is not an integer of at least 0, or a digest not text")
    sums = [(stream, stream["parts"]) for stream in streams]
    sums += [(manifest["splits"][s], [e["splits"][s] for e in manifest["sources"].values()]) for s in SPLITS]
    for (whole, parts), key in itertools.product(sums, COUNTS):
        if whole[key] != sum(part[key] for part in parts):
            raise ValueError(f"{key} are not the sum of their parts")


def parse_manifest(place: str, content: bytes) -> dict:
    """The manifest's values, with the types that the store relies on."""
    try:
        manifest = parse_json(place, content, MEND)
        if manifest["format"] != FORMAT:
            found = f"{place}: format is {manifest['format']!r}"
            raise UserError(f"{found}, this k2jax reads format {FORMAT}; prepare the store again")
        manifest = unsealed(place, manifest, MEND)
        _check_types(manifest)
    except UserError as error:
        raise CorruptStore(*error.problems) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{place}: is not a manifest of k2jax ({type(error).__name__}: {error}); {MEND}") from None
    return manifest


def file_problems(folder: Folder, files: dict) -> Iterator[str]:
    """Problems that a listing of the folder shows; no file is read. Sizes are seen on local disks alone."""
    found = {*folder.names()}
    if not found:  # TensorStore's gcs driver takes a refusal for an empty list, but the manifest has been read
        yield f"{folder}: its files cannot be listed; give the credentials the right to do so"
        return
    for name, entry in files.items():
        if name not in found:
            yield f"{folder}/{name}: is missing; {MEND}"
        elif folder.local is not None and (size := (folder.local / name).stat().st_size) != entry["bytes"]:
            yield f"{folder}/{name}: has {size} bytes, the manifest says {entry['bytes']}; {MEND}"
    for name in sorted(found - files.keys() - {"manifest.json"}):
        if name.startswith(SPLITS):  # what people leave beside it is theirs
            yield f"{folder}/{name}: is not in the manifest; move it out of the store"


# NumPy reads a header with ast.literal_eval, and Python 3.11 counts its depth for all threads together: where a collection
# of garbage lets a second thread in, as JAX's callbacks do, one of the two ends in SystemError (python/cpython#106905).
ONE_HEADER_AT_A_TIME = threading.Lock()


class VerifiedFolder:
    """A folder whose files are compared with their digests when they are first read, by any number of threads."""

    def __init__(self, folder: Folder, files: dict):
        self.folder, self.files = folder, files
        self._verified, self._damaged, self._locks = set(), {}, [threading.Lock() for _ in range(64)]

    def verify(self, name: str) -> None:
        """Compare a file with its digest in the manifest, the first time it is named."""
        if name in self._verified:
            return
        with self._locks[hash(name) % len(self._locks)]:
            if name in self._verified:
                return
            if name not in self._damaged:  # once is enough: many rows may ask for the same file
                if (problem := self._problem(name)) is None:
                    self._verified.add(name)
                    return
                self._damaged[name] = problem
            raise CorruptStore(f"{self.folder}/{name}: {self._damaged[name]}; {MEND}")

    def _problem(self, name: str) -> str | None:
        if (entry := self.files.get(name)) is None:
            return "is not in the manifest"
        try:
            found = self.folder.describe(name)["sha256"]
        except OSError as error:
            return f"cannot be read: {error.strerror or 'No such file'}"
        return None if found == entry["sha256"] else f"sha256 is {found}, the manifest says {entry['sha256']}"

    def npy(self, name: str) -> np.ndarray:
        """An array file, mapped where it lies on a local disk."""
        self.verify(name)
        if self.folder.local is not None:
            with ONE_HEADER_AT_A_TIME:
                return np.asarray(np.load(self.folder.local / name, mmap_mode="r"))  # plain views are quicker to make
        content = io.BytesIO(self.folder.read(name))
        with ONE_HEADER_AT_A_TIME:
            return np.load(content)
