"""Rules that leave whole documents out: length, and Gopher's for repetition and quality.

The Gopher rules (Rae et al., 2021, arXiv 2112.11446, table A1 and section A.1.1) are datatrove's, over words that no
language defines: runs of letters and digits, and single characters of scripts without spaces. The rules that suppose
English are off: the stop words, and the least mean length of a word, which Chinese would never reach.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from k2jax.data.text.dedup import WORD
from k2jax.data.text.readers import Record

KINDS = ("repetition", "quality")


class Filter(NamedTuple):
    name: str
    reason: Callable[[Record], str | None]  # why a record is left out


def _length(min_chars: int, max_chars: int | None) -> Filter:
    def reason(record: Record) -> str | None:
        if len(record.text) < min_chars:
            return f"length: below {min_chars} characters"
        if max_chars is not None and len(record.text) > max_chars:
            return f"length: above {max_chars} characters"
        return None

    return Filter("length", reason)


def _words():
    """datatrove's interface to our words; other characters than spaces are words of their own, as in spaCy."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    token = re.compile(rf"{WORD.pattern}|[^\w\s]")

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return token.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError("no rule that is used asks for sentences")

        span_tokenize = sent_tokenize

    return Words()


def _gopher(kind: str) -> Filter:
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    if kind == "repetition":
        rules = GopherRepetitionFilter(language=_words())
    else:
        rules = GopherQualityFilter(language=_words(), min_stop_words=None, min_avg_word_length=None)

    def reason(record: Record) -> str | None:
        found = rules.filter(Document(text=record.text, id=record.name))
        return None if found is True else f"{kind}: {found[1].removeprefix('gopher_')}"

    return Filter(kind, reason)


def make_filters(kinds: tuple[str, ...], min_chars: int, max_chars: int | None) -> list[Filter]:
    """The length rule, then the others of KINDS that are wanted, in the order of KINDS."""
    return [_length(min_chars, max_chars), *(_gopher(kind) for kind in KINDS if kind in kinds)]
