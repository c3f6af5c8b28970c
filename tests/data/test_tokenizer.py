"""Tokenizers: round trips, no specials from text, and the library as the reference."""

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tiktoken

from k2jax.data import tokenizer as module
from k2jax.data.tokenizer import PRE_SPLIT, load_tokenizer, split_long, train_bpe
from k2jax.errors import UserError

TEXTS = [
    "",
    "a",
    "Hello WORLD's, don't 1234567 stop  \n\n  x\r\ny\t",
    "漢字かな交じり文 한국어 naïve façade ÅNGSTRÖM",
    "<|bos|>[BOS]<|eos|>[EOS]<|im_end|>",
    "emoji 👩‍👩‍👧 \x00\x7f\ufeff \u2028",
]
MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b" wo", b"12", b"123", b"\xe6\xbc", b"\xe6\xbc\xa2"]


def slow_split_long(text):
    """Kimi's guards, a character at a time."""
    pieces = []
    for part in [text[i : i + 400_000] for i in range(0, len(text), 400_000)]:
        start, length, space = 0, 0, None
        for i, character in enumerate(part):
            length, space = (length + 1 if character.isspace() == space else 1), character.isspace()
            if length > 25_000:
                pieces.append(part[start:i])
                start, length = i, 1
        pieces.append(part[start:])
    return pieces


@pytest.fixture
def ranks():
    return {token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + MERGES)}


@pytest.fixture
def tiktoken_path(tmp_path, ranks):
    return write_ranks(tmp_path / "small.tiktoken", ranks)


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return str(path)


@pytest.fixture(scope="module")
def trained():
    return train_bpe(iter(["the cat sat on the mat, hello hello 12 12 漢字 漢字\n"] * 20), 300)


@pytest.fixture(params=["byte", "tiktoken", "trained"])
def tokenizer(request, tiktoken_path, trained, tmp_path):
    if request.param == "trained":
        (tmp_path / "tokenizer.json").write_bytes(trained.definition)
        return load_tokenizer(str(tmp_path / "tokenizer.json"))
    return load_tokenizer({"byte": "byte", "tiktoken": tiktoken_path}[request.param])


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_without_specials(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & tokenizer.specials.keys()
    assert max(ids.tolist(), default=0) < tokenizer.vocab_size


def test_decode_shows_specials_and_replaces_what_is_not_text(tokenizer):
    letter = tokenizer.encode("é").tolist()
    ids = [tokenizer.bos, *letter, tokenizer.eos, tokenizer.vocab_size, -1, letter[0]]
    bos, eos = tokenizer.specials[tokenizer.bos], tokenizer.specials[tokenizer.eos]
    assert tokenizer.decode(ids) == f"{bos}é{eos}" + "\ufffd" * 3
    assert (bos, eos) in {("<|bos|>", "<|eos|>"), ("[BOS]", "[EOS]")}


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError) as error:
        tokenizer.encode("ab\ud800")
    expected = r"text: character 2 is '\ud800', half a surrogate pair, which UTF-8 cannot hold; remove it"
    assert str(error.value) == expected


def test_byte_layout():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (258, 256, 257)
    assert tokenizer.encode("hé").tolist() == [104, 0xC3, 0xA9]
    assert tokenizer.digest == hashlib.sha256(b"byte: UTF-8 bytes, bos 256, eos 257").hexdigest()


def test_tiktoken_layout_is_kimis(tiktoken_path):
    tokenizer = load_tokenizer(tiktoken_path)
    base = 256 + len(MERGES)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (base + 256, base, base + 1)
    # K2's ids minus its 163,584 base ranks
    assert [tokenizer.specials[base + i] for i in (2, 9, 255)] == ["<|im_end|>", "[EOT]", "[PAD]"]


@pytest.mark.parametrize("text", [*TEXTS, "hello world 1234 漢漢字", "x" * 60_000 + " " * 60_000 + "12" * 200_000])
def test_tiktoken_matches_the_library(tiktoken_path, ranks, text):
    tokenizer = load_tokenizer(tiktoken_path)
    reference = tiktoken.Encoding("reference", pat_str=PRE_SPLIT, mergeable_ranks=ranks, special_tokens={"[BOS]": 266})
    expected = [token for piece in slow_split_long(text) for token in reference.encode_ordinary(piece)]
    assert tokenizer.encode(text).tolist() == expected


def test_pre_split_pieces():
    """Cut by hand by the rules: Han runs stand alone, digits go by three, a contraction stays with its word."""
    pieces = ["Hello", " WORLD's", "漢字", "かな", "漢", " x", "漢字", "123", "456", "7", " !?\n\n\n", "  "]
    pieces += [" Camel", "Casedon't", "漢", "ー", "  "]
    ranks = {bytes([i]): i for i in range(256)}
    for piece in pieces:  # every prefix is a token: then each piece merges into one
        raw = piece.encode()
        for end in range(2, len(raw) + 1):
            ranks.setdefault(raw[:end], len(ranks))
    for a, b in itertools.pairwise(pieces):  # and two pieces would, if they were not cut apart
        ranks.setdefault((a + b).encode(), len(ranks))
    encoding = tiktoken.Encoding("pieces", pat_str=PRE_SPLIT, mergeable_ranks=ranks, special_tokens={})
    assert [encoding.decode([token]) for token in encoding.encode_ordinary("".join(pieces))] == pieces


def test_guards_match_a_slow_loop():
    rng = np.random.default_rng(0)
    runs = [
        ("ab漢"[i % 3] if i % 2 else " \n\u3000"[i % 3]) * int(n) for i, n in enumerate(rng.integers(1, 70_000, 40))
    ]
    for text in ("", "abc", "".join(runs), "x" * 25_000, "x" * 25_001, "x" * 800_000, "a b " * 200_001):
        pieces = split_long(text)
        assert pieces == slow_split_long(text) and "".join(pieces) == text


def test_trained_stays_within_vocab_and_learns(trained):
    assert (trained.bos, trained.eos) == (0, 1) and 258 < trained.vocab_size <= 300
    assert len(trained.encode("hello the cat")) < len("hello the cat")
    assert len(train_bpe(iter(["abc"]), 258).encode("abc")) == 3


def test_digest_is_of_the_definition(trained, tiktoken_path, tmp_path, monkeypatch):
    (tmp_path / "copy.json").write_bytes(trained.definition)
    copy = load_tokenizer(str(tmp_path / "copy.json"))
    assert copy.digest == trained.digest and copy.encode("the cat").tolist() == trained.encode("the cat").tolist()
    before = load_tokenizer(tiktoken_path).digest
    monkeypatch.setattr(module, "PRE_SPLIT", r"\p{N}|\P{N}+")
    assert load_tokenizer(tiktoken_path).digest != before


@pytest.mark.parametrize(
    "spec, hint",
    [("bytes", "no such file; must be 'byte', "), ("train", "no such file"), ("k2.tiktoken", "no such file"),
     ("", "no such file"), (__file__, "has neither suffix")],
)  # fmt: skip
def test_unknown_spec(spec, hint):
    with pytest.raises(UserError) as error:
        load_tokenizer(spec)
    assert str(error.value).startswith(f"tokenizer = {spec!r}: {hint}")


def test_unknown_spec_names_the_nearest():
    with pytest.raises(UserError) as error:
        load_tokenizer("bite")
    assert str(error.value) == (
        "tokenizer = 'bite': no such file; must be 'byte', 'train:VOCAB' (in prepare), the path of a .tiktoken file "
        "or of tiktoken.model, or the path of a tokenizer.json; nearest: 'byte'"
    )


@pytest.mark.parametrize("vocab", ["", "257", "-1", "4k", "٣٠٠"])
def test_vocab_too_small(vocab):
    with pytest.raises(UserError, match="VOCAB must be an integer of at least 258.*nearest: 'train:258'"):
        module.train_vocab(f"train:{vocab}")


def test_broken_tiktoken_files_name_every_line(tmp_path, ranks):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"!!! 0\nYQ== x\nYQ==\nYg== 1\nYg== 2\nYw== 1\n")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(path))
    assert error.value.problems == (
        f"{path}: line 1: b'!!! 0' must be a base64 token, a space and its rank",
        f"{path}: line 2: b'YQ== x' must be a base64 token, a space and its rank",
        f"{path}: line 3: b'YQ==' must be a base64 token, a space and its rank",
        f"{path}: line 5: token b'b' or rank 2 came before; both must be unique",
        f"{path}: line 6: token b'c' or rank 1 came before; both must be unique",
    )
    for change, text in (
        ({b"hello": 999}, "ranks must be 0 to 265 without a gap; lowest 0, highest 999"),
        ({b"\x00": None}, "1 of the 256 single bytes have no rank, first 0x00"),
    ):
        kept = {token: rank for token, rank in {**ranks, **change}.items() if rank is not None}
        if b"\x00" not in kept:
            kept = {token: i for i, token in enumerate(kept)}
        with pytest.raises(UserError, match=text):
            load_tokenizer(write_ranks(path, kept))
    path.write_bytes(b"x\n" * 30)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(path))
    assert len(error.value.problems) == 11
    assert error.value.problems[-1] == "30 problems of this kind in all; the first 10 are above"


def test_foreign_tokenizer_json(tmp_path):
    import tokenizers

    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="is not one of the `tokenizers` library"):
        load_tokenizer(str(path))
    path.write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(UserError) as error:
        load_tokenizer(str(path))
    assert len(error.value.problems) == 3 and "('WordLevel', None, None), must be" in error.value.problems[2]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
            "truncation is set",
        ),
        (
            {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|bos|>"}},
            "padding is set",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "pre_tokenizer: ByteLevel with add_prefix_space",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}]}},
            "pre_tokenizer: Split with behavior Removed",
        ),
    ],
)  # fmt: skip
def test_what_adds_or_drops_text_is_refused(trained, tmp_path, change, problem):
    definition = json.loads(trained.definition)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition | change))
    with pytest.raises(UserError, match=re.escape(f"tokenizer.json: {problem}; ")):
        load_tokenizer(str(path))


def test_text_cannot_become_an_added_token(trained, tmp_path):
    definition = json.loads(trained.definition)
    for token in definition["added_tokens"]:
        token["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(UserError, match=re.escape("'<|bos|>' is not special")):
        load_tokenizer(str(path))


def test_importing_the_tokenizer_is_light():
    heavy = {"tensorstore", "grain", "jax", "tiktoken", "tokenizers"}
    code = f"import sys, k2jax.data.tokenizer; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
