"""Words of messages. Imports nothing of ours."""

from collections.abc import Iterable


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """"1 document", "1,200 documents"; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(items: Iterable[object]) -> str:
    """"1", "1 and 3", "1, 2 and 3"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
