"""Filters on documents made to break one rule each; the same rules for languages with and without spaces."""

import random

import pytest

from k2jax.data.text.filters import KINDS, make_filters
from k2jax.data.text.readers import Record

WORDS = {
    "English": [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26)],
    "Russian": [f"слово{chr(0x430 + i)}{chr(0x430 + j)}" for i in range(26) for j in range(26)],
    "Korean": ["".join(chr(0xAC00 + (7 * i + j) % 900) for j in range(3)) for i in range(600)],
    "Chinese": [chr(0x4E00 + i) for i in range(900)],
}


def text_of(language, count=300, seed=0):
    rng = random.Random(seed)
    words = [rng.choice(WORDS[language]) for _ in range(count)]
    space = "" if language == "Chinese" else " "
    return "\n\n".join(space.join(words[i : i + 30]) + "." for i in range(0, count, 30))


def reasons(text, kinds=KINDS, min_chars=1, max_chars=None):
    found = [rule.reason(Record("x", text, None)) for rule in make_filters(kinds, min_chars, max_chars)]
    return [reason for reason in found if reason]


@pytest.mark.parametrize("language", WORDS)
def test_usual_text_of_any_language_stays(language):
    assert reasons(text_of(language)) == []


@pytest.mark.parametrize("language", WORDS)
def test_few_words_and_repetition_go_in_any_language(language):
    assert reasons(text_of(language, 40)) == ["quality: short_doc"]
    assert reasons(text_of(language, 60) * 5, ("repetition",)) == ["repetition: dup_para_frac"]
    half = text_of(language, 150)
    assert reasons(half + "\n" + half.replace("\n\n", " ").replace(".", ""), ("repetition",))[0].startswith(
        "repetition: duplicated_"
    )


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda text: "x" * 4000 + " " + text[:700], "quality: above_avg_threshold"),
        (lambda text: text + " #" * 60, "quality: too_many_hashes"),
        (lambda text: text + " ..." * 60, "quality: too_many_ellipsis"),
        (lambda text: "- " + text.replace("\n\n", "\n- "), "quality: too_many_bullets"),
        (lambda text: text.replace(".\n\n", "...\n"), "quality: too_many_end_ellipsis"),
        (lambda text: text + " 12" * 90, "quality: below_alpha_threshold"),
    ],
)
def test_each_rule_of_quality(change, reason):
    assert reasons(change(text_of("English")), ("quality",)) == [reason]


def test_length():
    assert reasons("x" * 9, (), 10, 20) == ["length: below 10 characters"]
    assert reasons("x" * 10, (), 10, 20) == reasons("x" * 20, (), 10, 20) == []
    assert reasons("x" * 21, (), 10, 20) == ["length: above 20 characters"]
