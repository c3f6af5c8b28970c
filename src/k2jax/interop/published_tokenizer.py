"""The tokenizer of a published checkpoint: its file, names of special tokens, ids that begin and end texts."""

import dataclasses
from pathlib import Path

from k2jax.data.saved_tokenizer import foreign_tokenizer
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import UserError, first_of
from k2jax.files import read_json, read_small


def _object(path: Path) -> dict:
    """The object in a small JSON file; {} if there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path, follow_links=True)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be an object")
    return value


def _ids(where: str, value: object) -> list[int]:
    """An id, a list of ids or null, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise UserError(f"{where} = {value!r}: must be a token id, a list of them, or null")
    return ids


def _names(path: Path) -> dict[int, str]:
    """{id: name} of the added tokens in tokenizer_config.json; a chat template and a tool parser write these names."""
    entries = _object(path).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: added_tokens_decoder must be an object")
    problems = [
        f"{path}: added_tokens_decoder[{key!r}] must be the name of an id, as {{'content': NAME}}"
        for key, entry in entries.items()
        if not (key.isascii() and key.isdigit() and len(key) < 10)
        or not isinstance(entry, dict)
        or not isinstance(entry.get("content"), str)
    ]
    if problems:
        raise UserError(*first_of(problems))
    return {int(key): entry["content"] for key, entry in entries.items()}


def published_tokenizer(folder: Path, config: dict) -> Tokenizer | None:
    """Kimi's tiktoken file, or a tokenizer.json with bos and eos in config.json; None if there is neither.

    config: config.json, which names bos and eos; generation_config.json may name more ids that end a text. Raises
    UserError for files that are not what they should be.
    """
    bos, ends = (_ids(f"{folder}/config.json: {name}", config.get(name)) for name in ("bos_token_id", "eos_token_id"))
    path = folder / "generation_config.json"
    ends += _ids(f"{path}: eos_token_id", _object(path).get("eos_token_id"))
    names = _names(folder / "tokenizer_config.json")
    tokenizer = None
    for name in ("tiktoken.model", "tokenizer.tiktoken"):
        if tokenizer is None and (folder / name).exists():
            read_small(folder / name, follow_links=True)
            tokenizer = load_tokenizer(str(folder / name), kind=".tiktoken")
    if tokenizer is None and (folder / "tokenizer.json").exists() and bos and ends:
        tokenizer = foreign_tokenizer(read_small(folder / "tokenizer.json", follow_links=True), bos[0], ends[0])
    if tokenizer is None:
        return None
    size = tokenizer.vocab_size
    if outside := sorted({i for i in [*bos, *ends, *names] if i >= size}):
        raise UserError(f"{folder}: names the ids {outside[:5]}, which the tokenizer of {size} ids does not have")
    eos = ends[0] if ends else tokenizer.eos
    more = tuple(dict.fromkeys(i for i in ends if i != eos))
    ids = {"bos": bos[0] if bos else tokenizer.bos, "eos": eos}
    return dataclasses.replace(tokenizer, **ids, ends=more, specials=tokenizer.specials | names)
