"""The checks of `make train`'s sample: code passes, garbage of every kind fails."""

import random
import runpy
import string
from pathlib import Path

import pytest

NAMES = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "quickstart.py"))
CODE = Path(random.__file__).read_text()
LETTERS = random.Random(0)
GARBAGE = {
    "quotation marks": '"""' * 200 + "\n" + '""""""\n' * 40,
    "one line": "    return self.value\n" * 60,
    "letters": "".join(LETTERS.choice(string.ascii_letters + " \n") for _ in range(3000)),
    "names alone": "random\n" * 60,
    "comments": "# a comment that says nothing\n" * 60,
    "empty": "\n" * 60,
    "digits": "".join(f"{i}\n" for i in range(300)),
}


def verdicts(text: str) -> tuple[bool, bool, bool]:
    share = NAMES["most_common_share"](list(text.encode()))  # bytes: a stand-in for a tokenizer
    return share <= 0.15, NAMES["known_words"](text, CODE.encode()) >= 0.6, len(NAMES["kinds_of_statements"](text)) >= 2


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_fails(kind):
    assert not all(verdicts(GARBAGE[kind]))


def test_code_passes():
    text = CODE[CODE.index("def sample") :][:4000]
    share, words, statements = verdicts(text.replace("    ", "\t"))  # spaces of an indent are one token of a BPE
    assert share and words and statements
    assert len(NAMES["kinds_of_statements"](CODE)) >= 4


def test_a_block_from_inside_a_function_counts():
    lines = ["        if x:", "            y = f(x)", "        for a in b:", "            g(a)", "        return y"]
    assert NAMES["kinds_of_statements"]("\n".join(["junk ("] + lines + ["    ((("]), 5) == {
        "If",
        "Assign",
        "For",
        "Expr",
        "Return",
    }


def test_bigram_of_bytes():
    """Two bytes in turn are certain; a text of other bytes costs what its share of 0.01 counts says."""
    assert NAMES["bigram_bits"](b"ab" * 5000, b"ab" * 100) < 0.01
    assert NAMES["bigram_bits"](b"ab" * 5000, b"xy" * 100) == pytest.approx(8)
