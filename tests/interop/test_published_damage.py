"""Small files of a published folder with other content: an error by name, or the same model; never a traceback.

The folder carries no digest. A number, a name or an id that another folder could have as well is therefore believed,
and so is a tensor whose bits have changed; FREE lists the fields of which this is true. Nothing else may change unseen.
"""

import copy
import difflib
import json
import os
import random

import pytest
from tiny_published import SHAPES, draw_tensors, write_checkpoint

from k2jax.data.tokenizer import train_bpe
from k2jax.errors import UserError
from k2jax.interop import hf, published_tokenizer
from k2jax.interop.published_tokenizer import published_tokenizer as open_published_tokenizer

K2 = SHAPES["k2"] | {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
FREE = {
    "config.json": {
        *("rope_theta", "rope_scaling", "rms_norm_eps", "routed_scaling_factor", "num_experts_per_tok"),
        *("n_group", "topk_group", "max_position_embeddings", "torch_dtype"),
    },
    "generation_config.json": {"eos_token_id", "bos_token_id"},  # the latter must agree, if it is there
    "tokenizer_config.json": {"added_tokens_decoder", "eos_token"},
}
VALUES = [None, [], {}, "", "x", "1", -1, 0, 1, 2, 1.5, True, False, 10**30, 10**400, 2**31, 2**63, 1e300, -0.0, [[]],
          [1], ["a"], {"a": 1}, "\0", "\ud800", 5e-324, "y" * 10**5]  # fmt: skip
OTHERS = [b"", b"null", b"[]", b"3", b'"x"', b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"NaN", b"9" * 5000,
          b'{"eos_token_id": 1e999}', b'{"eos_token_id": Infinity}', b"\0" * 9, b"\xef\xbb\xbf{}"]  # fmt: skip
HEADERS = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
SMALL = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", *HEADERS]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("published") / "hf", K2, draw_tensors(K2), num_files=2)
    own = train_bpe(iter(["the ferry left the pier"] * 9), 290)
    entries = {str(i): {"content": name, "special": True, "lstrip": False} for i, name in own.specials.items()}
    names = {"bos_token": own.specials[0], "eos_token": {"content": own.specials[1]}}
    (folder / "tokenizer.json").write_bytes(own.definition)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries, **names}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    return folder


def paths_in(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths_in(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def damaged(content, draw, bits, edits, head):
    """Every bit flipped, or `bits` of them; and `edits` random edits; of the first `head` bytes."""
    flips = [(i, bit) for i in range(head) for bit in range(8)]
    for i, bit in flips if len(flips) <= bits else draw.sample(flips, bits):
        yield content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]
    for _ in range(edits):
        start, size = draw.randrange(head), draw.choice([0, 1, 1, 2, 5, 40])
        yield content[:start] + draw.randbytes(draw.choice([0, 1, 3])) + content[start + size :]


def model_of(folder):
    found = hf.open_published(folder, drop_mtp=True)
    return hf._config_for(found, "run").validate().to_json(), found.rope, found.tensors


def tokenizer_of(folder):
    found = open_published_tokenizer(folder, {"vocab_size": K2["vocab_size"], "bos_token_id": 0, "eos_token_id": 1})
    return found and (found.bos, found.eos, found.ends, found.specials, found.visible, found.vocab_size)


def unexplained(before, after):
    """Fields that have changed or are gone, and names that are nearly one of those."""
    after = after if isinstance(after, dict) else {}
    changed = {name for name, value in before.items() if name not in after or after[name] != value}
    return changed | {name for name in after.keys() - before.keys() if difflib.get_close_matches(name, changed, 1, 0.9)}


@pytest.mark.parametrize("name", SMALL)
def test_nothing_changes_unseen(source, monkeypatch, name):
    read = tokenizer_of if "token" in name or "generation" in name else model_of
    if name == "config.json":  # the tensors and the tokenizer stay: read once
        tensors = hf.find_tensors(source)
        monkeypatch.setattr(hf, "find_tensors", lambda folder: tensors)
    elif name != "tokenizer.json":
        tokenizer = published_tokenizer._opened(source)
        monkeypatch.setattr(published_tokenizer, "_opened", lambda folder: tokenizer)
    path, good, draw = source / name, read(source), random.Random(name)
    content = path.read_bytes()
    is_json = name.endswith(".json")
    head = len(content) if is_json else 8 + int.from_bytes(content[:8], "little")
    bits, edits = (2000, 500) if name in ("generation_config.json", "tokenizer_config.json") else (250, 250)
    changed = [*OTHERS, *damaged(content, draw, bits, edits, head)]
    if is_json:
        tree = json.loads(content)
        places = list(paths_in(tree))
        places = places[:60] + draw.sample(places[60:], min(20, len(places[60:])))
        changed += [json.dumps(replaced(tree, place, value)).encode() for place in places for value in VALUES]
    refused = 0
    try:
        for other in changed:
            path.write_bytes(other)
            try:
                found = read(source)
            except UserError as error:
                assert error.problems and len(str(error)) < 5000, other[:200]
                refused += 1
                continue
            if found != good and name != "tokenizer.json":
                assert unexplained(tree, json.loads(other)) <= FREE.get(name, set()), other[:2000]
    finally:
        path.write_bytes(content)
    assert refused > len(changed) / 3


@pytest.mark.parametrize("name", SMALL)
def test_files_that_are_too_large_or_not_files(source, name):
    path, aside = source / name, source / "aside"
    read = tokenizer_of if "token" in name or "generation" in name else model_of
    path.rename(aside)
    try:
        with open(path, "wb") as file:
            file.write((2**40).to_bytes(8, "little"))
            file.truncate(2**26 + 1)
        with pytest.raises(UserError, match=f"{name}: .* 64 MiB"):
            read(source)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match=f"{name}: (is not a regular file|is missing)"):
            read(source)
    finally:
        path.unlink()
        aside.rename(path)
