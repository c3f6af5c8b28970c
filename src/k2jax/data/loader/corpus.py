"""All that a run reads: the sources of one or more stores, and what the config makes of them."""

import hashlib
import itertools

from k2jax.config import Config
from k2jax.data.loader.packing import Packing, Windows
from k2jax.data.store.manifest import SPLITS
from k2jax.data.store.megatron import MegatronStore, is_megatron
from k2jax.data.store.protocol import Store
from k2jax.data.store.reader import TokenStore
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import UserError


class Corpus:
    """Stores opened together. streams: {split: {source: Stream}}. Every source has one name, in one store."""

    def __init__(self, stores: list[Store]):
        self.stores, self.path = stores, ",".join(store.path for store in stores)
        self.digest, self.validation_digest = stores[0].digest, None  # the second of data.validation_path
        if len(stores) > 1:
            self.digest = hashlib.sha256(" ".join(store.digest for store in stores).encode()).hexdigest()
        self.vocab_size = max(store.vocab_size for store in stores)
        self.streams, self.sources, self.store_of = {split: {} for split in SPLITS}, {}, {}
        for store in stores:
            self.sources |= store.sources
            self.store_of |= dict.fromkeys(store.sources, store)
            for split in SPLITS:
                self.streams[split] |= {name: s for name, s in store.streams[split].items() if s.num_tokens}

    def tokenizer(self):
        """The tokenizer that wrote the stores; None if .idx files do not say."""
        return self.stores[0].tokenizer()

    def num_tokens(self, split: str, source: str | None = None) -> int:
        return sum(stream.num_tokens for name, stream in self.streams[split].items() if source in (None, name))

    def text_bytes(self, split: str, source: str | None = None) -> int:
        """UTF-8 bytes of the documents' text; bos and eos have none."""
        return sum(stream.text_bytes for name, stream in self.streams[split].items() if source in (None, name))


def _open(path: str, tokenizer: str | None, index_dir: str) -> Store:
    return MegatronStore(path, tokenizer, index_dir) if is_megatron(path) else TokenStore(path)


def open_corpus(
    paths: str, tokenizer: str | None = None, index_dir: str = "data/indexes", namesakes: bool = False
) -> Corpus:
    """The stores at `paths`, joined by commas; every problem of every one at once, as UserError.

    tokenizer, index_dir: as in config.DataConfig, for .idx files. namesakes: two stores may have a source of one name,
    of which `streams` has the later one; an audit looks into stores that a run had one after the other.
    """
    stores, problems = [], []
    for path in paths.split(","):
        try:
            stores.append(_open(path.strip(), tokenizer, index_dir))
        except UserError as error:
            problems += error.problems
    names = [name for store in stores for name in store.sources]
    for name in sorted({name for name in names if names.count(name) > 1 and not namesakes}):
        owners = " and ".join(store.path for store in stores if name in store.sources)
        problems.append(f"data.path: {owners} both have a source {name!r}; prepare one of them under another name")
    digests = {store.tokenizer_digest: store.path for store in stores}
    if len(digests) > 1:
        problems.append(f"data.path: {' and '.join(digests.values())} were written by different tokenizers")
    if problems:
        raise UserError(*problems)
    return Corpus(stores)


def _leaks(stores: list[Store]) -> list[str]:
    """True if a document may be trained on in one store and held out in another: a hash below the fraction decides."""
    fractions = {store.path: store.validation_fraction for store in stores if store.validation_fraction is not None}
    if len({*fractions.values()}) < 2:
        return []
    found = " and ".join(f"{path} has {fraction}" for path, fraction in fractions.items())
    rule = "a document of two would be trained on in one and held out in the other"
    mend = "prepare them with one validation_fraction, or give held-out text as data.validation_path"
    return [f"data.path: validation_fraction differs, {found}: {rule}; {mend}"]


def held_out_streams(corpus: Corpus) -> dict:
    """{source: Stream} of a corpus that is held out: of a source without a validation split it is all that there is."""
    return corpus.streams["train"] | corpus.streams["validation"]


def open_data(config: Config) -> Corpus:
    """The corpus that a run reads, with the held-out text of data.validation_path where that is given."""
    data = config.data
    corpus = open_corpus(data.path, data.tokenizer, data.index_dir)
    if data.validation_path is None:
        if problems := _leaks(corpus.stores):
            raise UserError(*problems)
        return corpus
    held_out = open_corpus(data.validation_path, data.tokenizer, data.index_dir)
    if {s.tokenizer_digest for s in (*held_out.stores, *corpus.stores)} != {corpus.stores[0].tokenizer_digest}:
        raise UserError(
            f"data.validation_path = {data.validation_path!r}: was written by another tokenizer than data.path"
        )
    validation, trained = held_out_streams(held_out), {store.digest: store.path for store in corpus.stores}
    if problems := [
        f"data.validation_path: {store.path}: its source {name!r} has no validation split, and is the training text "
        f"of data.path = {trained[store.digest]}; give text that is not trained on"
        for name, stream in validation.items()
        if (store := held_out.store_of[name]).digest in trained and stream is store.streams["train"][name]
    ]:
        raise UserError(*problems)
    corpus.streams["validation"], corpus.validation_digest = validation, held_out.digest
    return corpus


def make_cut(store, config: Config, source: str) -> Windows | Packing:
    """The cut of a source's training stream into rows."""
    stream, length = store.streams["train"][source], config.data.sequence_length
    if config.data.packing == "best_fit":
        return Packing(stream, length, store.digest, config.data.index_dir)
    return Windows(stream, length)


def writes_alike(tokenizer: Tokenizer, corpus: Corpus, num_documents: int = 32) -> bool:
    """True if `tokenizer` is the store's, or gives the same ids for its first held-out documents."""
    own = corpus.tokenizer()
    if own is None or tokenizer.digest == own.digest:
        return True
    streams = corpus.streams["validation"].values()
    borders = [(stream, stream.borders(0, min(num_documents, stream.num_documents))) for stream in streams]
    spans = [(stream, *span) for stream, ends in borders for span in itertools.pairwise(ends.tolist())]
    for stream, start, stop in spans[:num_documents]:
        bos, *ids, eos = stream.read(start, stop).tolist()
        if [bos, eos] != [tokenizer.bos, tokenizer.eos] or tokenizer.encode(own.decode(ids)).tolist() != ids:
            return False
    return True
