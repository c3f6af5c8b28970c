"""Counts in messages."""

import pytest

from k2jax.words import counted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "document"), "1 document"),
        ((0, "document"), "0 documents"),
        ((1200, "bad row"), "1,200 bad rows"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
    ],
)
def test_counted(arguments, text):
    assert counted(*arguments) == text
