"""The interface of stores that the loader reads: token stores of ours, and files of Megatron-LM."""

from typing import Protocol

from k2jax.data.tokenizer import Tokenizer


class Store(Protocol):
    """Tokens of one or more sources, opened for reading.

    path: as the user gave it. digest: changes with any byte of the store.
    sources: {name: {"derived_from", "variants"}}.
    streams: {split: {source: Stream}}. vocab_size: rows that an embedding needs. tokenizer_digest: "unknown" if the
    store does not say. validation_fraction: share of held-out documents, None if the store does not say.
    """

    path: str
    digest: str
    sources: dict[str, dict]
    streams: dict[str, dict]
    vocab_size: int
    tokenizer_digest: str
    validation_fraction: float | None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that wrote the store; None if it does not say. CorruptStore if it is another one now."""
