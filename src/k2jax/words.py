"""Words of messages. Imports nothing of ours."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """"1 document", "1,200 documents"; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
