"""Files as they are packed: the decompressed bytes of .gz, .bz2, .xz and .zst, local or behind a URL."""

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import PurePosixPath

from k2jax.files import is_url


class _Zstd(io.RawIOBase):
    """The content of all frames; EOFError if the last one is cut off, which zstandard's own reader ignores.

    Windows of up to 2 GiB (`zstd --long=31`) are accepted; memory grows with what a frame uses of it.
    """

    def __init__(self, packed: io.BufferedIOBase):
        import zstandard

        self.packed, self.new_frame = packed, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame, self.rest, self.ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def _fill(self) -> None:
        """Decompress until something is ready, or nothing is left."""
        while not self.ready and (packed := self.rest or self.packed.read(2**20)):
            self.frame = self.frame or self.new_frame()
            self.ready, self.rest = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None

    def readinto(self, buffer) -> int:
        self._fill()
        if not self.ready and self.frame is not None:
            raise EOFError("the compressed file ends within a frame")
        part = self.ready[: len(buffer)]
        buffer[: len(part)] = part
        self.ready = self.ready[len(part) :]
        return len(part)


_UNPACK = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": lambda stream: io.BufferedReader(_Zstd(stream), 2**20),
    ".zstd": lambda stream: io.BufferedReader(_Zstd(stream), 2**20),
}
# Recognised, so that they are refused by name instead of being left out as text that is not UTF-8.
ARCHIVES = (".7z", ".br", ".lz4", ".rar", ".snappy", ".sz", ".tar", ".tgz", ".z", ".zip")


def suffixes_of(name: str) -> tuple[str, str]:
    """(".jsonl", ".gz") of "a.jsonl.gz": the kind of file and how it is packed, "" for neither; lower case."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _UNPACK else ""
    return suffixes[-1] if suffixes else "", packed


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[io.BufferedIOBase]:
    """The decompressed bytes of a file, to read forward."""
    with contextlib.ExitStack() as stack:
        if is_url(path):
            import fsspec

            stream = stack.enter_context(fsspec.open(path, "rb"))
        else:
            stream = stack.enter_context(open(path, "rb"))
        if unpack := _UNPACK.get(suffixes_of(path)[1]):
            stream = stack.enter_context(unpack(stream))
        yield stream
