"""The rules that a config must keep, over its flat form {"section.field": value}; every violation is found."""

import itertools
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from os.path import expanduser
from typing import Literal

from k2jax.files import is_url
from k2jax.words import counted

UNIONS = types.UnionType, typing.Union  # of `X | None`; the second where X is Annotated


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to print more than 4300 digits
        return "an integer of more than 4300 digits"


def _fits(value: object, kind: object) -> bool:
    origin = typing.get_origin(kind)
    if origin in UNIONS:
        return any(_fits(value, k) for k in typing.get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and value != () and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:  # an int is a fine float, unless no float is as large; a bool is neither
        return _is_number(value) and -sys.float_info.max <= value <= sys.float_info.max
    return type(value) is kind


def describe_type(kind: object) -> str:
    """The words for a field's type in messages."""
    origin = typing.get_origin(kind)
    if origin in UNIONS:
        return " or ".join(describe_type(k) for k in typing.get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if origin is tuple:
        return f"a list, each {describe_type(typing.get_args(kind)[0])}"
    return {float: "a finite number", int: "an integer", str: "text", bool: "True or False", types.NoneType: "None"}[
        kind
    ]


MAX_WEIGHTS = 1_000_000  # a phase's pattern of sources is a table of so many rows


def read_shares(text: str) -> dict[str, int]:
    """{"web": 70, "code": 30} of "web=70 code=30". ValueError with the rule that it breaks."""
    pairs = [pair.partition("=") for pair in text.split()]
    if not pairs or not all(name and number.isascii() and number.isdigit() for name, _, number in pairs):
        raise ValueError("must be pairs source=integer with spaces between, such as 'web=70 code=30'")
    shares = {name: int(number) for name, _, number in pairs}
    if len(shares) < len(pairs):
        raise ValueError("must name each source once")
    return shares


def read_steps(text: str) -> tuple[int, int]:
    """(1200, 1220) of "1200-1219": the first step, and the first one after. ValueError with the rule."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()) or int(first) > int(last):
        raise ValueError("must be FIRST-LAST, two steps that rise, such as '1200-1219'")
    return int(first), int(last) + 1


def read_options(given: Sequence[str]) -> dict[str, str]:
    """{"xla_flag": "value"} of "xla_flag=value" each. ValueError with the rule that one breaks."""
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.startswith("xla_") and name.isidentifier()):
            raise ValueError(f"{text!r} must be NAME=VALUE with a name such as 'xla_gpu_graph_level=0'")
        if name in options:
            raise ValueError(f"{name!r} must be given once")
        options[name] = value
    return options


@dataclass(frozen=True)
class Rule:
    """Bounds of a field, and "may change on resume", as they stand beside the field's type in config.py.

    Numbers must be greater than 0 unless they may be zero.
    """

    zero: bool = False
    least: tuple[int, str] | None = None  # the bound, and its reason
    below: float | None = None
    path: bool = False  # one path or several joined by commas
    folder: bool = False  # written to: a URL would become a folder called "gs:"
    resume: bool = False  # no later state depends on it, so that a resumed run may change it

    def joined(self, other: "Rule") -> "Rule":
        """Both rules in one."""
        return Rule(*(getattr(other, f.name) or getattr(self, f.name) for f in fields(self)))


def home_problem(paths: str) -> str | None:
    """The rule that one of these paths, joined by commas, breaks by beginning with ~: a folder of that name."""
    if not any(path.startswith("~") for path in paths.split(",")):
        return None
    return (
        f"must not begin with ~, which is not expanded here; nearest: {','.join(map(expanduser, paths.split(',')))!r}"
    )


def _number_problem(value: object, rule: Rule) -> str | None:
    numbers = [v for v in (value if isinstance(value, tuple) else [value]) if _is_number(v)]
    if any(v < 0 or (v == 0 and not rule.zero) for v in numbers):
        return f"must be {'at least 0' if rule.zero else 'greater than 0'}"
    if rule.least is not None and any(v < rule.least[0] for v in numbers):
        return "must be at least {}, {}".format(*rule.least)
    if rule.below is not None and any(v >= rule.below for v in numbers):
        return f"must be below {rule.below}"
    if any(isinstance(v, int) and v >= 2**63 for v in numbers):
        return "must be below 2**63, as in 64 bits"
    return None


def _own_problems(values: dict, kinds: dict, rules: dict[str, Rule]) -> dict[str, str]:
    """{field: problem} of the fields that are wrong whatever the others are."""
    problems = {}
    for name, kind in kinds.items():
        value, rule = values[name], rules[name]
        if not _fits(value, kind):
            problems[name] = f"must be {describe_type(kind)}"
        elif name == "optim.optimizer" and value != "muonclip" and not all(value.rpartition(":")):
            example = "such as 'docs/chains.py:adamw' (docs/own_optimizer.md)"
            problems[name] = f"must be 'muonclip', 'FILE.py:function' or 'module:function', {example}"
        elif problem := _number_problem(value, rule):
            problems[name] = problem
        elif (rule.path or rule.folder) and value is not None and (home := home_problem(value)):
            problems[name] = home
        elif rule.folder and value is not None and is_url(value):
            problems[name] = "must be a folder, not a URL; copy it there when the run is done, or mount the bucket"
    return {name: f"{name} = {_shown(values[name])}: {problem}" for name, problem in problems.items()}


# (a field, the fields whose product must divide it). Explicit shardings need every cut dim to divide evenly.
_MULTIPLES = [
    ("model.n_routed_experts", ["mesh.expert"]),
    ("model.n_routed_experts", ["model.n_group"]),
    ("model.num_attention_heads", ["mesh.tensor"]),
    ("model.vocab_size", ["mesh.tensor"]),
    ("model.hidden_size", ["mesh.fsdp"]),
    ("model.q_lora_rank", ["mesh.fsdp"]),
    ("model.kv_lora_rank", ["mesh.fsdp"]),
    ("model.qk_rope_head_dim", [2]),  # RoPE turns pairs
    ("data.sequence_length", ["mesh.context", "mesh.tensor"]),
    ("data.batch_sequences", ["train.num_microbatches", "mesh.replica", "mesh.fsdp", "mesh.expert"]),
    ("train.num_microbatches", ["mesh.stage"]),
    ("train.num_microbatches", ["train.microbatches_together"]),
    ("train.microbatches_together", ["mesh.stage"]),
    ("train.eval_sequences", ["mesh.replica", "mesh.stage", "mesh.fsdp", "mesh.expert"]),
]
# (a field, the field it must not exceed)
_AT_MOST = [
    ("model.first_k_dense_replace", "model.num_hidden_layers"),
    ("model.num_experts_per_tok", "model.n_routed_experts"),
    ("model.topk_group", "model.n_group"),
    ("optim.warmup_tokens", "optim.constant_until_tokens"),
    ("optim.constant_until_tokens", "optim.cosine_until_tokens"),
    ("optim.final_learning_rate", "optim.learning_rate"),
]


def _fit_problems(values: dict):
    """Rules between fields; a rule is skipped if one of its fields is wrong in itself and so absent here."""
    for name, divisors in _MULTIPLES:
        sizes = [values.get(d) if isinstance(d, str) else d for d in divisors]
        if values.get(name) is None or None in sizes or values[name] % (divisor := math.prod(sizes)) == 0:
            continue
        value = values[name]
        near = [n for n in (value // divisor * divisor, (value // divisor + 1) * divisor) if n > 0]
        rule = f"must be a multiple of {' * '.join(map(str, divisors))} = {divisor}"
        yield f"{name} = {value}: {rule}; nearest: {' or '.join(map(str, near))}"
    for name, limit in _AT_MOST:
        if name in values and limit in values and values[name] > values[limit]:
            yield f"{name} = {values[name]}: must be at most {limit} = {values[limit]}"
    if (values.get("kernels.expert_buffer") or 1) < 1:
        rule = "must be at least 1, the balanced load, or None for no bound"
        yield f"kernels.expert_buffer = {values['kernels.expert_buffer']}: {rule}; nearest: 1.0"
    yield from _pipeline_problems(values)
    yield from _group_problems(values)
    yield from _phase_problems(values)
    yield from _mixture_problems(values)
    yield from _data_problems(values)
    try:
        read_options(values.get("kernels.compiler_options") or ())
    except ValueError as rule:
        yield f"kernels.compiler_options: {rule}"


def _pipeline_problems(values: dict):
    """Problems of dealing the MoE layers out to pipeline stages, and of axes that do not go with them."""
    names = "mesh.stage", "model.num_hidden_layers", "model.first_k_dense_replace"
    stages, layers, dense = map(values.get, names)
    if (together := values.get("train.microbatches_together")) is not None and stages == 1:
        yield f"train.microbatches_together = {together}: must be None without pipeline stages (mesh.stage = 1)"
    if None in (stages, layers, dense) or stages == 1:
        return
    if (moe := layers - dense) < 1 or moe % stages:
        divisors = [n for n in range(1, moe + 1) if moe % n == 0]
        below, above = [n for n in divisors if n < stages], [n for n in divisors if n > stages]
        near = [*(below[-1:] or [1]), *above[:1]]
        rule = f"must divide the {max(moe, 0)} MoE layers, of which each stage has as many"
        yield f"mesh.stage = {stages}: {rule}; nearest: {' or '.join(map(str, near))}"
    for axis in ("tensor", "context"):
        if values.get(f"mesh.{axis}", 1) > 1:
            yield f"mesh.{axis} = {values[f'mesh.{axis}']}: must be 1 with mesh.stage = {stages}; use fsdp or expert"


def _group_problems(values: dict):
    """Problems of groups that leave too few experts to choose from."""
    experts, groups, used, chosen = (
        values.get(f"model.{n}") for n in ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
    )
    if None in (experts, groups, used, chosen) or groups == 1 or experts % groups:
        return
    size = experts // groups
    if size < 2:
        yield f"model.n_group = {groups}: a group's score is the sum of its best two experts; at most {experts // 2}"
    if size * used < chosen <= experts:
        yield (
            f"model.num_experts_per_tok = {chosen}: model.topk_group = {used} groups of {size} experts hold "
            f"{size * used}; at most that, or a model.topk_group of at least {-(-chosen // size)}"
        )


def _phase_problems(values: dict):
    names = [name for name in values if name.startswith("phases.")]
    starts = values.get("phases.start_tokens")
    if starts is None:
        return
    for name in names:
        if len(values[name]) != len(starts):
            count = f"{len(starts)}, one per phase, as phases.start_tokens has"
            yield f"{name} = {values[name]!r}: has {counted(len(values[name]), 'value')}, must have {count}"
    if starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        yield f"phases.start_tokens = {starts!r}: must begin with 0 and rise; nearest: {tuple(sorted({0, *starts}))!r}"
    stretched = "yarn" in values.get("phases.rope", ())
    if stretched and values.get("model.rope.factor", 1) is None:
        yield "phases.rope: 'yarn' needs model.rope.factor, which is None; give the factor or use 'plain'"


def _mixture_problems(values: dict):
    phases, weights = values.get("phases.start_tokens", ()), values.get("mixture.weights", ())
    if weights and phases and len(weights) not in (1, len(phases)):
        counts = "1" if len(phases) == 1 else f"1 or {len(phases)}"
        rule = f"has {counted(len(weights), 'entry', 'entries')}, must have {counts}, one per phase, as phases.start_tokens has"
        yield f"mixture.weights = {weights!r}: {rule}"
    for text in weights:
        try:
            shares = {} if text == "natural" else read_shares(text)
        except ValueError as rule:
            yield f"mixture.weights: {text!r} {rule}, or 'natural'"
            continue
        if shares and not 0 < sum(shares.values()) <= MAX_WEIGHTS:
            yield f"mixture.weights: {text!r} adds up to {sum(shares.values())}, must be 1 to {MAX_WEIGHTS:,}"
    if epochs := values.get("mixture.epochs"):
        try:
            if 0 in read_shares(epochs).values():
                yield f"mixture.epochs = {epochs!r}: must be at least 1 of each source; a weight of 0 leaves it out"
        except ValueError as rule:
            yield f"mixture.epochs = {epochs!r}: {rule}"


def _data_problems(values: dict):
    if (values.get("data.fim_rate") is None) != (values.get("data.fim_tokens") is None):
        yield "data.fim_rate, data.fim_tokens: must be given together, or neither"
    if (tokens := values.get("data.fim_tokens")) is not None and len({*tokens}) != 3:
        yield f"data.fim_tokens = {tokens!r}: must be three different ids, before prefix, suffix and middle"
    for token in tokens or ():
        if token >= values.get("model.vocab_size", math.inf):
            yield f"data.fim_tokens: {token} must be below model.vocab_size = {values['model.vocab_size']}"
    ranges = []
    for text in values.get("data.skip_steps") or ():
        try:
            ranges.append(read_steps(text))
        except ValueError as rule:
            yield f"data.skip_steps: {text!r} {rule}"
    for (first, last), (start, stop) in itertools.pairwise(ranges):
        if start < last:
            yield f"data.skip_steps: {start}-{stop - 1} must come after {first}-{last - 1}, and not meet it"


def problems(values: dict[str, object], kinds: dict[str, object], rules: dict[str, Rule]) -> Iterator[str]:
    """Every violated rule of the fields' values, whose types are `kinds`."""
    own = _own_problems(values, kinds, rules)
    yield from own.values()
    yield from _fit_problems({name: value for name, value in values.items() if name not in own})
