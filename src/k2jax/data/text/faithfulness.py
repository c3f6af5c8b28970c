"""Checks that a rewritten text still says what its source says: cheap counts first, then a question to the endpoint.

The counts find what a language model does when it fails: stops early, answers instead of rewriting, copies, or makes
up figures. They are lenient; what they let through, the endpoint is asked about, as K2's report checks "semantic
alignment" (arXiv 2507.20534, 2.2). Neither proves that a text is right.
"""

import re
from collections import Counter

from k2jax.data.text.dedup import WORD, share_of_common_shingles
from k2jax.data.text.readers import parse_json

_SHORTEST, _LONGEST = 0.4, 2.5  # characters of a rewrite per character of its source
_MOST_COMMON = 0.8  # Jaccard similarity of sets of 5 words; above, it is a copy
_FEWEST_NUMBERS, _MOST_NEW_NUMBERS = 0.9, 0.1  # shares of the source's, and of the rewrite's
_FEWEST_WORDS = 0.15  # share of the source's different words
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

JUDGE = (
    "You compare a rewritten text with its source. Answer with one JSON object and nothing else: "
    '{"faithful": true} if the rewrite states every fact, figure and name of the source and adds none that the source '
    'does not support; otherwise {"faithful": false, "reason": "what is wrong, in a few words"}. '
    "Style, order and length do not matter."
)


def _numbers(text: str) -> Counter:
    """Numbers of two digits or more, without the marks between groups of three."""
    found = (re.sub(r"[.,](?=\d{3}(?!\d))", "", number) for number in _NUMBER.findall(text))
    return Counter(number for number in found if len(number) > 1)


def _missing(wanted: Counter, found: Counter) -> float:
    """The share of `wanted`'s different numbers that `found` lacks."""
    return sum(number not in found for number in wanted) / len(wanted) if wanted else 0.0


def quick_check(source: str, rewrite: str, same_language: bool = True) -> str | None:
    """The fault that the counts find with `rewrite`, None if there is none."""
    length = len(rewrite.strip()) / len(source.strip())
    if not _SHORTEST <= length <= _LONGEST:
        return "length: too short" if length < _SHORTEST else "length: too long"
    before, after = _numbers(source), _numbers(rewrite)
    if _missing(before, after) > 1 - _FEWEST_NUMBERS:
        return "numbers: some are lost"
    if _missing(after, before) > _MOST_NEW_NUMBERS:
        return "numbers: some are new"
    words, rewritten = set(WORD.findall(source.lower())), set(WORD.findall(rewrite.lower()))
    if same_language and words and len(words & rewritten) / len(words) < _FEWEST_WORDS:
        return "words: too few of the source's"
    if share_of_common_shingles(source, rewrite) > _MOST_COMMON:
        return "a copy of the source"
    return None


def question(source: str, rewrite: str) -> list[dict]:
    """The messages that ask the endpoint to judge."""
    text = f"<source>\n{source}\n</source>\n\n<rewrite>\n{rewrite}\n</rewrite>"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": text}]


def verdict(answer: str) -> str | None:
    """None for a faithful rewrite, else what is wrong; an answer that is no verdict counts as wrong."""
    match = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        found = parse_json(match[0]) if match else {}
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not isinstance(found.get("faithful"), bool):
        return "meaning: the endpoint gave no verdict"
    return None if found["faithful"] else "meaning: the endpoint finds it unfaithful"
