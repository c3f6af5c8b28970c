"""Text to token ids and back: bytes, a tiktoken file in Kimi's format, or a BPE trained here.

Text never becomes a special token: "<|bos|>" in a document is seven characters like any others.
"""

import base64
import binascii
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from k2jax.errors import UserError, first_of
from k2jax.files import read_small

# Kimi's pre-split: a token never crosses these pieces. Letters of Han script stand alone, so the letter classes
# of words leave them out, by a set intersection that Python's `re` does not know.
_CASELESS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_HEAD, _TAIL = rf"[\p{{Lu}}\p{{Lt}}{_CASELESS}]", rf"[\p{{Ll}}{_CASELESS}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_SPLIT = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_HEAD}*{_TAIL}+{_AFTER}",
        f"{_BEFORE}{_HEAD}+{_TAIL}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_NUM_SPECIALS = 256  # rows that Kimi's format keeps after the base ranks
_KIMI_SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 9: "[EOT]", 10: "<|im_system|>",
    17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
_BOS, _EOS = "<|bos|>", "<|eos|>"
_MAX_CHARS, _MAX_RUN = 400_000, 25_000  # Kimi's guards: longer inputs overflow the regex's stack
_LONG_SPACE = re.compile(rf"\s{{{_MAX_RUN + 1}}}")
_FORMS = (
    "'byte', 'train:VOCAB' (in prepare), the path of a .tiktoken file or of tiktoken.model, or the path of a "
    "tokenizer.json"
)


@dataclass(frozen=True)
class Tokenizer:
    """A fixed map between text and ids in [0, vocab_size); `vocab_size` is the rows an embedding needs.

    `digest` is the sha256 of what defines the map, `definition` the bytes of its file (None for "byte") and
    `file_name` the name under which a token store keeps them.
    """

    spec: str
    vocab_size: int
    bos: int
    eos: int
    digest: str
    definition: bytes | None = field(repr=False)
    file_name: str | None
    specials: dict[int, str] = field(repr=False)
    _encode: Callable[[str], np.ndarray] = field(repr=False)
    _decode: Callable[[list[int]], str] = field(repr=False)
    ends: tuple[int, ...] = ()  # ids that end a generated text, besides eos
    visible: tuple[int, ...] = ()  # specials that other libraries keep when they leave special tokens out of a text

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a generated text."""
        return self.eos, *self.ends

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids of `text`, without bos and eos. UserError for text that has no UTF-8 form."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"text: character {error.start} is {text[error.start]!r}"
            raise UserError(f"{found}, half a surrogate pair, which UTF-8 cannot hold; remove it") from None
        return self._encode(text)

    def decode(self, ids) -> str:
        """Text of `ids`; specials by name, bytes that are not UTF-8 and ids outside the vocabulary as U+FFFD."""
        groups = itertools.groupby((int(i) for i in ids), self._renderer)
        return "".join(render(list(group)) for render, group in groups)

    def _names(self, ids: list[int]) -> str:
        return "".join(self.specials.get(i, "\ufffd") for i in ids)

    def _renderer(self, token: int) -> Callable[[list[int]], str]:
        return self._names if token in self.specials or not 0 <= token < self.vocab_size else self._decode


def _has_long_run(text: str) -> bool:
    """True if `split_long` has to look for runs, which takes six times as long as this."""
    if len(text) <= _MAX_RUN:
        return False
    return max(map(len, text.split()), default=0) > _MAX_RUN or _LONG_SPACE.search(text) is not None


def split_long(text: str) -> list[str]:
    """Pieces of `text` of at most 400,000 characters, without more than 25,000 (non-)whitespace ones in a row."""
    pieces = []
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        cuts = [0]
        if _has_long_run(part):
            for run in re.finditer(r"\S+|\s+", part):
                cuts += range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)
        pieces += [part[a:b] for a, b in itertools.pairwise([*cuts, len(part)])]
    return pieces


def _concatenated(encode_piece: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    def encode(text: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.uint32), *(encode_piece(piece) for piece in split_long(text))])

    return encode


def _digest(kind: str, definition: bytes) -> str:
    return hashlib.sha256(f"{kind}\n{PRE_SPLIT}\n".encode() + definition).hexdigest()


def _byte_tokenizer() -> Tokenizer:
    return Tokenizer(
        spec="byte",
        vocab_size=258,
        bos=256,
        eos=257,
        digest=hashlib.sha256(b"byte: UTF-8 bytes, bos 256, eos 257").hexdigest(),
        definition=None,
        file_name=None,
        specials={256: _BOS, 257: _EOS},
        _encode=lambda text: np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32),
        _decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )


def _refuse(path: str, problems: list[str]) -> None:
    """Raise the first ten problems, and how many there are."""
    if problems:
        raise UserError(*first_of([f"{path}: {problem}" for problem in problems]))


def _parse_ranks(path: str, definition: bytes) -> dict[bytes, int]:
    """{token: rank} of a .tiktoken file; the ranks must be 0..n-1 and hold all single bytes."""
    ranks, seen, problems = {}, set(), []
    for number, line in enumerate(definition.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            problems.append(f"line {number}: {line[:60]!r} must be a base64 token, a space and its rank")
            continue
        if token in ranks or rank in seen:
            problems.append(f"line {number}: token {token!r} or rank {rank} came before; both must be unique")
        ranks[token] = rank
        seen.add(rank)
    if not problems and sorted(ranks.values()) != list(range(len(ranks))):
        rule = f"the {len(ranks)} ranks must be 0 to {len(ranks) - 1} without a gap"
        problems.append(f"{rule}; lowest {min(seen, default=None)}, highest {max(seen, default=None)}")
    absent = [value for value in range(256) if bytes([value]) not in ranks]
    if not problems and absent:
        what = f"{len(absent)} of the 256 single bytes have no rank, first {absent[0]:#04x}"
        problems.append(f"{what}; some text could not be encoded, use the whole file")
    _refuse(path, problems)
    return ranks


def tiktoken_ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """{token: rank} of a tokenizer that was read from a tiktoken file."""
    return _parse_ranks(tokenizer.spec, tokenizer.definition)


def _tiktoken_tokenizer(spec: str, definition: bytes) -> Tokenizer:
    import tiktoken

    ranks = _parse_ranks(spec, definition)
    base = len(ranks)
    encoding = tiktoken.Encoding("k2jax", pat_str=PRE_SPLIT, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(
        spec=spec,
        vocab_size=base + _NUM_SPECIALS,
        bos=base,
        eos=base + 1,
        digest=_digest("tiktoken", definition),
        definition=definition,
        file_name="tokenizer.tiktoken",
        specials={base + i: _KIMI_SPECIALS.get(i, f"<|reserved_token_{base + i}|>") for i in range(_NUM_SPECIALS)},
        _encode=_concatenated(lambda piece: encoding.encode_to_numpy(piece, disallowed_special=())),
        _decode=lambda ids: encoding.decode_bytes(ids).decode("utf-8", errors="replace"),
    )


def _lossy_splits(part: dict | None) -> Iterator[str]:
    """Pre-tokenizers, of a tokenizer.json's tree of them, that add or drop characters."""
    kind = (part or {}).get("type")
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _lossy_splits(inner)
    elif kind == "ByteLevel" and part["add_prefix_space"]:
        yield "ByteLevel with add_prefix_space"
    elif kind in ("Split", "Punctuation") and part["behavior"] == "Removed":
        yield f"{kind} with behavior Removed"
    elif kind not in (None, "ByteLevel", "Split", "Punctuation", "Digits"):
        yield kind


def _lossy_parts(parts: dict) -> Iterator[str]:
    """Parts of a byte-level BPE's tokenizer.json by which ids would not be those of the whole text alone."""
    yield from (f"{name} is set" for name in ("truncation", "padding") if parts.get(name))
    yield from (f"pre_tokenizer: {found}" for found in _lossy_splits(parts["pre_tokenizer"]))
    names = "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    yield from (f"model.{name} is {parts['model'][name]!r}" for name in names if parts["model"].get(name))
    for token in parts["added_tokens"]:  # of special ones `encode_special_tokens` makes text
        if not token["special"] and token["content"] in (_BOS, _EOS):
            yield f"the added token {token['content']!r} is not special, so that text could become it"
        elif not token["special"] and (token["lstrip"] or token["rstrip"]):
            yield f"the added token {token['content']!r} takes the spaces beside it"


def tokenizers_model(where: str, definition: bytes):
    """The `tokenizers` library's model of a tokenizer.json. UserError if it is not one, or two tokens have one id."""
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        vocabulary = model.get_vocab()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception for what it cannot parse; a Rust panic is not one
        raise UserError(f"{where}: is not one of the `tokenizers` library: {str(error)[:300]}") from None
    tokens = {i: token for token, i in vocabulary.items()}
    if len(tokens) < len(vocabulary):
        i = min(i for token, i in vocabulary.items() if tokens[i] != token)
        first, second, *_ = sorted(token for token, other in vocabulary.items() if other == i)
        raise UserError(f"{where}: {first!r} and {second!r} have the same id {i}; ids must be unique")
    return model


def _check_trained(path: str, model) -> None:
    """Only a byte-level BPE without normalizer keeps every text, so nothing else is accepted."""
    from tokenizers.pre_tokenizers import ByteLevel

    parts = json.loads(model.to_str())  # as the library has completed it: older files leave out what is null
    absent = [name for name in (_BOS, _EOS) if model.token_to_id(name) is None]
    problems = [f"has no token {name}, which begins or ends every document; use 'train:VOCAB'" for name in absent]
    normalizer = parts["normalizer"]
    if normalizer == {"type": "Sequence", "normalizers": []}:  # DeepSeek-V3's file says "nothing" so
        normalizer = None
    kinds = parts["model"]["type"], (parts["decoder"] or {}).get("type"), normalizer
    if kinds != ("BPE", "ByteLevel", None):
        problems.append(
            f"model, decoder and normalizer are {kinds}, must be ('BPE', 'ByteLevel', None); others could lose text, "
            "use 'train:VOCAB'"
        )
    elif any(model.token_to_id(letter) is None for letter in ByteLevel.alphabet()):
        problems.append("lacks some of the 256 byte tokens; some text could not be encoded")
    if kinds[0] == "BPE":
        rule = "ids would not be those of the text; remove it, or use 'train:VOCAB'"
        problems += [f"{found}; {rule}" for found in _lossy_parts(parts)]
    _refuse(path, problems)


def _trained_tokenizer(spec: str, definition: bytes) -> Tokenizer:
    model = tokenizers_model(spec, definition)
    _check_trained(spec, model)
    model.encode_special_tokens = True  # special names in the text are text
    specials = {i: token.content for i, token in model.get_added_tokens_decoder().items()}
    return Tokenizer(
        spec=spec,
        vocab_size=max(model.get_vocab().values()) + 1,
        bos=model.token_to_id(_BOS),
        eos=model.token_to_id(_EOS),
        digest=_digest("tokenizer.json", definition),
        definition=definition,
        file_name="tokenizer.json",
        specials=specials,
        _encode=_concatenated(lambda piece: np.array(model.encode(piece, add_special_tokens=False).ids, np.uint32)),
        _decode=lambda ids: model.decode(ids, skip_special_tokens=False),
    )


def train_vocab(spec: str) -> int | None:
    """VOCAB of "train:VOCAB", None for another spec; UserError if VOCAB has no room for 256 bytes, bos and eos."""
    if not spec.startswith("train:"):
        return None
    vocab = spec.removeprefix("train:")
    if not (vocab.isascii() and vocab.isdigit()) or int(vocab) < 258:
        rule = "VOCAB must be an integer of at least 258, for 256 bytes, bos and eos"
        raise UserError(f"tokenizer = {spec!r}: {rule}; nearest: 'train:258'")
    return int(vocab)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, <|bos|> 0 and <|eos|> 1 among them; fewer if merges run out."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    train_vocab(f"train:{vocab_size}")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((piece for text in texts for piece in split_long(text)), trainer)
    return _trained_tokenizer(f"train:{vocab_size}", model.to_str(pretty=True).encode())


def load_tokenizer(spec: str, kind: str | None = None) -> Tokenizer:
    """The tokenizer of "byte", a path of a .tiktoken file, or a path of a tokenizer.json; else UserError.

    kind: the suffix to take for the path's own. Kimi's tiktoken.model counts as .tiktoken.
    """
    if spec == "byte":
        return _byte_tokenizer()
    path = Path(spec)
    kind = kind or (".tiktoken" if path.name == "tiktoken.model" else path.suffix)
    if not path.is_file() or kind not in (".tiktoken", ".json"):
        near = difflib.get_close_matches(spec, ("byte", "train:32768"), n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        what = "has neither suffix" if path.is_file() else "no such file"
        raise UserError(f"tokenizer = {spec!r}: {what}; must be {_FORMS}{hint}")
    definition = read_small(path, follow_links=True)
    return (_tiktoken_tokenizer if kind == ".tiktoken" else _trained_tokenizer)(spec, definition)
