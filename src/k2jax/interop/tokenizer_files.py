"""A tokenizer of ours as the files that other libraries read."""

import json

from k2jax.data.tokenizer import PRE_SPLIT, Tokenizer, tiktoken_ranks
from k2jax.errors import UserError


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


def written_tokens(ranks: dict[bytes, int]) -> dict[str, int]:
    """{token as byte-level BPE writes it: rank}."""
    letters = _byte_letters()
    return {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by the rank of what it makes: tiktoken merges any of them."""
    ranked = sorted(ranks, key=ranks.__getitem__)
    return [(t[:i], t[i:]) for t in ranked for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks]


def _tokenizer_json(tokenizer: Tokenizer, ranks: dict[bytes, int], split: str | None) -> bytes:
    """tokenizer.json of a byte-level BPE with these ranks; text is cut by the regex `split` first."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    written, specials = written_tokens(ranks), {name: i for i, name in tokenizer.specials.items()}
    vocab, letters = written | specials, dict(zip(ranks, written, strict=True))
    if len(vocab) < len(ranks) + len(tokenizer.specials):
        raise UserError("tokenizer.json: a special token's name is another token's too; it cannot be written")
    merges = [(letters[a], letters[b]) for a, b in _merges(ranks)]
    model = Model(models.BPE(vocab, merges, ignore_merges=True))  # as tiktoken: a piece that is a token stays whole
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    model.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(n, special=True) for n, i in specials.items() if i not in tokenizer.visible])
    model.add_tokens([AddedToken(n, normalized=False) for n, i in specials.items() if i in tokenizer.visible])
    return model.to_str(pretty=True).encode()


def _added(name: str, special: bool) -> dict:
    """An entry of added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **flags, "special": special}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """{file name: content}: tokenizer.json with its config for transformers and mlx-lm, the ids that end a generated
    text, and tiktoken.model if it is one.

    Nothing is put before a text by itself: the caller begins with bos, as k2jax does.
    """
    files = {}
    if tokenizer.file_name == "tokenizer.tiktoken":
        files["tiktoken.model"] = tokenizer.definition
        files["tokenizer.json"] = _tokenizer_json(tokenizer, tiktoken_ranks(tokenizer), PRE_SPLIT)
    elif tokenizer.definition is None:
        files["tokenizer.json"] = _tokenizer_json(tokenizer, {bytes([b]): b for b in range(256)}, None)
    else:
        files["tokenizer.json"] = tokenizer.definition
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.specials.get(tokenizer.bos),
        "eos_token": tokenizer.specials.get(tokenizer.eos),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): _added(name, i not in tokenizer.visible) for i, name in sorted(tokenizer.specials.items())
        },
    }
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": [tokenizer.eos, *tokenizer.ends]}
    small = {"tokenizer_config.json": settings, "generation_config.json": generation}
    return files | {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in small.items()}
