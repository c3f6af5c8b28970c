"""A tokenizer kept in a folder of its own, so that a run or an imported model can be used without its token store."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from k2jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_model
from k2jax.errors import UserError
from k2jax.files import read_sealed, read_small, write_atomic, write_sealed

_INFO = "tokenizer_info.json"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` into `folder`, which is made: its definition, its ids that begin and end texts, its names."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.definition is not None:
        write_atomic(folder / tokenizer.file_name, tokenizer.definition)
    info = {"file": tokenizer.file_name, "digest": tokenizer.digest, "bos": tokenizer.bos, "eos": tokenizer.eos}
    info |= {"ends": [*tokenizer.ends], "visible": [*tokenizer.visible]}
    info["specials"] = {str(i): name for i, name in tokenizer.specials.items()}
    write_sealed(folder / _INFO, info)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote. Raises UserError if there is none, or another one."""
    if not os.path.lexists(folder / _INFO):
        raise UserError(f"{folder}: holds no tokenizer ({_INFO})")
    info = read_sealed(folder / _INFO)
    definition = None if info["file"] is None else read_small(folder / info["file"])
    if info["file"] == "foreign.json":
        tokenizer = foreign_tokenizer(definition, info["bos"], info["eos"])
    else:
        tokenizer = load_tokenizer("byte" if info["file"] is None else str(folder / info["file"]))
    if tokenizer.digest != info["digest"]:
        raise UserError(f"{folder}: the tokenizer is not the one that was saved; restore its files")
    specials = {int(i): name for i, name in info["specials"].items()}
    ids = {name: info[name] for name in ("bos", "eos")} | {name: tuple(info[name]) for name in ("ends", "visible")}
    return dataclasses.replace(tokenizer, **ids, specials=specials)


def foreign_tokenizer(definition: bytes, bos: int, eos: int) -> Tokenizer:
    """Another model's tokenizer.json: it may lose text, so it serves to use that model and not to prepare tokens."""
    model = tokenizers_model("tokenizer.json", definition)
    added = model.get_added_tokens_decoder()
    return Tokenizer(
        spec="foreign",
        vocab_size=max(model.get_vocab().values(), default=-1) + 1,
        bos=bos,
        eos=eos,
        digest=hashlib.sha256(definition).hexdigest(),
        definition=definition,
        file_name="foreign.json",
        specials={i: token.content for i, token in added.items()},
        visible=tuple(sorted(i for i, token in added.items() if not token.special)),
        _encode=lambda text: np.array(model.encode(text, add_special_tokens=False).ids, np.uint32),
        _decode=lambda ids: model.decode(ids, skip_special_tokens=False),
    )
