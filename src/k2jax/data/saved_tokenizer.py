"""A tokenizer kept in a folder of its own, so that a run or an imported model can be used without its token store."""

import hashlib
import os
from pathlib import Path

import numpy as np

from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.errors import UserError
from k2jax.files import read_sealed, read_small, write_atomic, write_sealed

_INFO = "tokenizer_info.json"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.definition is not None:
        write_atomic(folder / tokenizer.file_name, tokenizer.definition)
    info = {"file": tokenizer.file_name, "digest": tokenizer.digest, "bos": tokenizer.bos, "eos": tokenizer.eos}
    write_sealed(folder / _INFO, info)


def open_tokenizer(folder: Path) -> Tokenizer:
    """What `save_tokenizer` wrote. Raises UserError where there is none, or another one."""
    if not os.path.lexists(folder / _INFO):
        raise UserError(f"{folder}: holds no tokenizer ({_INFO})")
    info = read_sealed(folder / _INFO)
    if info["file"] == "foreign.json":
        tokenizer = foreign_tokenizer(read_small(folder / info["file"]), info["bos"], info["eos"])
    else:
        if info["file"] is not None:
            read_small(folder / info["file"])  # a regular file of a sane size
        tokenizer = load_tokenizer("byte" if info["file"] is None else str(folder / info["file"]))
    if tokenizer.digest != info["digest"]:
        raise UserError(f"{folder}: the tokenizer is not the one that was saved; restore its files")
    return tokenizer


def foreign_tokenizer(definition: bytes, bos: int, eos: int) -> Tokenizer:
    """Another model's tokenizer.json: it may lose text, so it serves to use that model and not to prepare tokens."""
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise UserError(f"tokenizer.json: is none of the `tokenizers` library: {error}") from None
    specials = {i: token.content for i, token in model.get_added_tokens_decoder().items()}
    return Tokenizer(
        spec="foreign",
        vocab_size=max(model.get_vocab().values()) + 1,
        bos=bos,
        eos=eos,
        digest=hashlib.sha256(definition).hexdigest(),
        definition=definition,
        file_name="foreign.json",
        specials=specials,
        _encode=lambda text: np.array(model.encode(text, add_special_tokens=False).ids, np.uint32),
        _decode=lambda ids: model.decode(ids, skip_special_tokens=False),
    )


def published_tokenizer(folder: Path, bos: int | None, eos: int | None) -> Tokenizer | None:
    """The tokenizer of a published checkpoint: Kimi's tiktoken file, or a tokenizer.json; None where there is neither.

    bos, eos: the ids that the checkpoint's config.json names.
    """
    for name in ("tiktoken.model", "tokenizer.tiktoken"):
        if (folder / name).is_file():
            return load_tokenizer(str(folder / name), kind=".tiktoken")
    if not (folder / "tokenizer.json").is_file() or bos is None or eos is None:
        return None
    return foreign_tokenizer((folder / "tokenizer.json").read_bytes(), bos, eos)
