"""A token store in a few lines, for tests: the job of `k2jax prepare` without text files."""

from k2jax.data.store.manifest import SPLITS, CorruptStore
from k2jax.data.store.writer import DEFAULT_SOURCE, PART_TOKENS, PartWriter, merge_parts
from k2jax.data.text.tasks import split_hash
from k2jax.data.tokenizer import Tokenizer


def split_of(sha256: str, validation_fraction: float) -> str:
    """The split of a document by the hash of its text."""
    return SPLITS[split_hash(bytes.fromhex(sha256)) < validation_fraction]


def check_files(store) -> None:
    """Compare every file of a TokenStore with its digest. CorruptStore names all that differ."""
    problems = []
    for name in store.manifest["files"]:
        try:
            store._files.verify(name)
        except CorruptStore as error:
            problems += error.problems
    if problems:
        raise CorruptStore(*problems)


class TokenWriter:
    """Writes a store of one source into `folder`, which must be empty, part after part: for jobs of one process.

    It becomes a store when `finish` writes the manifest.
    """

    def __init__(self, folder, tokenizer: Tokenizer, *, source=DEFAULT_SOURCE, part_tokens=PART_TOKENS, **sizes):
        self.source, self.part_tokens, self.sizes, self.tokenizer = source, part_tokens, sizes, tokenizer
        self._part = PartWriter(folder, 0, tokenizer, **sizes)

    def append(self, split: str, name: str, text: str) -> int:
        """Add one document: bos, the tokens of `text`, eos. Gives its UTF-8 bytes."""
        if self._part.num_tokens >= self.part_tokens:
            self._part.finish()
            self._part = PartWriter(self._part.folder.url, self._part.part + 1, self.tokenizer, **self.sizes)
        return self._part.append(split, self.source, name, text)

    def finish(self, **created) -> dict:
        """Write the manifest and return it. `created`: JSON values for it that say where the documents came from."""
        self._part.finish()
        return merge_parts(self._part.folder.url, self._part.part + 1, self.tokenizer, **created)
