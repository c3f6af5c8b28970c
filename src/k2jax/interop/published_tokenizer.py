"""The tokenizer of a published checkpoint: its file, names of special tokens, ids that begin and end texts."""

import dataclasses
from collections import Counter
from pathlib import Path

from k2jax.data.saved_tokenizer import foreign_tokenizer
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, tiktoken_ranks
from k2jax.errors import UserError, first_of
from k2jax.files import read_json, read_small
from k2jax.interop.hf_config import misspelled, shown
from k2jax.interop.tokenizer_files import written_tokens

NUM_RESERVED = 256  # ids after the ranks of a tiktoken file, all of them special


def _object(path: Path, known: tuple[str, ...]) -> dict:
    """The object in a small JSON file, of which the fields `known` are read; {} if there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path, follow_links=True)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be an object")
    if problems := misspelled(str(path), value, known):
        raise UserError(*problems)
    return value


def _ids(where: str, value: object) -> list[int]:
    """An id, a list of ids or null, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise UserError(f"{where} = {shown(value)}: must be a token id, a list of them, or null")
    return ids


def _is_text(value: object) -> bool:
    """True for a string that has a UTF-8 form, as half a surrogate pair has not."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= c <= "\udfff" for c in value)


def _entries(path: Path, settings: dict) -> dict[int, tuple[str, bool]]:
    """{id: (name, special)} of the added tokens in tokenizer_config.json; chat templates and tool parsers use these."""
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: added_tokens_decoder must be an object")
    problems = []
    for key, entry in entries.items():
        where = f"{path}: added_tokens_decoder[{shown(key)}]"
        if not (key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key):
            problems.append(f"{where}: must be an id")
        elif not isinstance(entry, dict) or not _is_text(entry.get("content")):
            problems.append(f"{where} must be {{'content': NAME, 'special': true or false}}")
        elif type(entry.get("special", False)) is not bool:
            problems.append(f"{where}: special = {shown(entry['special'])}: must be true or false")
        else:
            problems += misspelled(where, entry, ("content", "special"))
    if problems:
        raise UserError(*first_of(problems))
    return {int(key): (entry["content"], entry.get("special", False)) for key, entry in entries.items()}


def _opened(folder: Path) -> Tokenizer | None:
    """The tokenizer in the folder's own file, by its own names; None if there is no such file."""
    for name in ("tiktoken.model", "tokenizer.tiktoken"):
        if (folder / name).exists():
            return load_tokenizer(str(folder / name), kind=".tiktoken")
    if not (folder / "tokenizer.json").exists():
        return None
    return foreign_tokenizer(read_small(folder / "tokenizer.json", follow_links=True), -1, -1)


def _renamed(tokenizer: Tokenizer, path: Path, entries: dict[int, tuple[str, bool]]) -> Tokenizer:
    """`tokenizer` with the names of tokenizer_config.json, which `path` is. UserError if they cannot be its names."""
    names, own = {i: name for i, (name, _) in entries.items()}, tokenizer.specials
    if tokenizer.file_name == "tokenizer.tiktoken":
        first = tokenizer.vocab_size - NUM_RESERVED
        problems = [f"{path}: names id {i}, must be {first} to {first + NUM_RESERVED - 1}" for i in names if i < first]
        own = {i: f"<|reserved_token_{i}|>" for i in own}  # as Kimi's own code names the rest
        ordinary = written_tokens(tiktoken_ranks(tokenizer))
        problems += [f"{path}: {shown(n)} of id {i} is an ordinary token" for i, n in names.items() if n in ordinary]
    else:
        problems = [
            f"{path}: id {i} is {shown(name)}, in tokenizer.json {shown(own[i])}; must be the same"
            for i, name in names.items()
            if own.get(i, name) != name
        ]
    times = Counter((own | names).values())
    problems += [f"{path}: {shown(name)} has {count} ids, must have one" for name, count in times.items() if count > 1]
    if problems:
        raise UserError(*first_of(problems))
    visible = {*tokenizer.visible, *(i for i, (_, special) in entries.items() if not special)}
    visible -= {i for i, (_, special) in entries.items() if special}
    return dataclasses.replace(tokenizer, specials=own | names, visible=tuple(sorted(visible)))


def _named(tokenizer: Tokenizer, path: Path, settings: dict, field: str) -> list[int]:
    """The id of bos_token or eos_token in tokenizer_config.json, as a list; empty if it is not given."""
    value = settings.get(field)
    name = value.get("content") if isinstance(value, dict) else value
    if name is None and value is None:
        return []
    found = [i for i, special in tokenizer.specials.items() if special == name]
    if not found:
        raise UserError(f"{path}: {field} = {shown(value)}: must be the name of a special token, or null")
    return found


def published_tokenizer(folder: Path, config: dict) -> Tokenizer | None:
    """Kimi's tiktoken file, or else a tokenizer.json; None if there is neither.

    config: config.json. It, generation_config.json and tokenizer_config.json name bos, which must be one, and ids that
    end a text: the first of them is eos, all end one. Raises UserError for files that are not what they should be, or
    disagree.
    """
    path, beside = folder / "tokenizer_config.json", folder / "generation_config.json"
    settings = _object(path, ("added_tokens_decoder", "bos_token", "eos_token"))
    generation = _object(beside, ("bos_token_id", "eos_token_id"))
    entries, tokenizer = _entries(path, settings), _opened(folder)
    if tokenizer is None:
        return None
    rows = config.get("vocab_size", tokenizer.vocab_size)
    if tokenizer.vocab_size > rows:
        sizes = f"ids up to {tokenizer.vocab_size - 1}, config.json vocab_size = {rows}"
        raise UserError(f"{folder}: the tokenizer has {sizes}: must be at most {rows - 1}")
    begins, ends = (
        {
            "config.json": _ids(f"{folder}/config.json: {name}", config.get(name)),
            "generation_config.json": _ids(f"{beside}: {name}", generation.get(name)),
        }
        for name in ("bos_token_id", "eos_token_id")
    )
    used = {*entries, *(i for ids in (*begins.values(), *ends.values()) for i in ids)}
    if outside := sorted(i for i in used if i >= tokenizer.vocab_size):
        size = tokenizer.vocab_size
        raise UserError(f"{folder}: names the ids {outside[:5]}, which the tokenizer of {size} ids does not have")
    if entries:
        tokenizer = _renamed(tokenizer, path, entries)
    begins["tokenizer_config.json"] = _named(tokenizer, path, settings, "bos_token")
    ends["tokenizer_config.json"] = _named(tokenizer, path, settings, "eos_token")
    bos = {i for ids in begins.values() for i in ids}
    eos = list(dict.fromkeys(i for ids in ends.values() for i in ids))
    if len(bos) > 1:
        found = ", ".join(f"{name} says {ids}" for name, ids in begins.items() if ids)
        raise UserError(f"{folder}: more than one token begins a text: {found}; must be the same one")
    if tokenizer.file_name == "tokenizer.tiktoken":
        bos, eos = bos or {tokenizer.bos}, eos or [tokenizer.eos]
    absent = [name for name, ids in (("bos_token_id", bos), ("eos_token_id", eos)) if not ids]
    if absent:
        raise UserError(*(f"{folder}/config.json: {name}: is missing; tokenizer.json needs it" for name in absent))
    return dataclasses.replace(tokenizer, bos=min(bos), eos=eos[0], ends=tuple(eos[1:]))
