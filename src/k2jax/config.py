"""What a run is: frozen dataclasses in sections, checked once, stored as JSON.

Model fields carry the names of the published `config.json` of the DeepSeek-V3 family, and every default
is Kimi K2's. Tokens are the unit of the schedule; a step is `data.batch_sequences * data.sequence_length`
tokens. "Off" is None.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Literal


class UserError(Exception):
    """A mistake that the user can mend: every problem found, one line each. The CLI prints them and exits with 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunFailed(Exception):
    """A run that began well cannot go on. The CLI prints the message and exits with 1."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network (K2's `config.json`)."""

    vocab_size: int = 163_840
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 1  # the first layers have a dense FFN
    num_attention_heads: int = 64
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 18_432  # dense FFN
    moe_intermediate_size: int = 2048  # one expert
    n_routed_experts: int = 384
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.827
    rms_norm_eps: float = 1e-6
    rope_theta: float = 50_000.0
    initializer_range: float = 0.006  # DeepSeek-V3 report 4.2; K2's is not published


@dataclass(frozen=True)
class OptimConfig:
    """MuonClip (K2 report, Algorithm 1) and its schedule; see docs/optimizer.md for what K2 leaves open."""

    learning_rate: float = 2e-4
    final_learning_rate: float = 2e-5
    warmup_tokens: int = 500 * 67_108_864
    constant_until_tokens: int = 10_000_000_000_000
    cosine_until_tokens: int = 15_500_000_000_000
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    update_rms: float = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    qk_clip_tau: float | None = 100.0
    router_bias_rate: float = 1e-3  # Moonlight's; K2's is not published


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order, in which portions."""

    path: str = "data/tokens"  # a token store made by `k2jax prepare`
    sequence_length: int = 4096
    batch_sequences: int = 16_384
    seed: int = 0
    read_threads: int = 4
    prefetch_sequences: int = 64


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; all axes are always there."""

    replica: int = 1  # copies of the model, over the slow network
    fsdp: int = 1  # cuts every matrix at rest
    expert: int = 1  # experts
    tensor: int = 1  # attention heads; tokens elsewhere
    context: int = 1  # positions of a sequence


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    run_dir: str = "runs/k2"
    num_steps: int = 230_968
    num_microbatches: int = 1
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "layer"] = "layer"
    log_every: int = 1  # steps between plain progress lines; metrics.jsonl has every step
    eval_every: int | None = None  # steps between validations; the end is always validated
    eval_sequences: int = 256


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept. Step 0 and the last step are always saved."""

    save_every: int = 500
    keep_last: int = 3
    save_timeout_seconds: int = 1200


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step."""
        return self.data.batch_sequences * self.data.sequence_length

    def validate(self) -> "Config":
        """Return self, or raise UserError with every violated rule."""
        values = flatten(dataclasses.asdict(self))
        own = _own_problems(values)
        problems = [*own.values(), *_fit_problems({name: value for name, value in values.items() if name not in own})]
        if problems:
            raise UserError(*problems)
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Config":
        """Inverse of `to_json`; raises UserError for unknown, missing or ill-typed fields, all at once."""
        try:
            values = flatten(json.loads(text))
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"config JSON: cannot be read: {error}") from None
        known = field_types()
        problems = [unknown_field(name) for name in values if name not in known]
        problems += [f"{name}: is missing" for name in known if name not in values]
        if problems:
            raise UserError(*problems)
        return Config().replace(values).validate()

    def replace(self, values: dict[str, object]) -> "Config":
        """A copy with `{"section.field": value}` set; the names must exist."""
        sections = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        return dataclasses.replace(
            self, **{section: dataclasses.replace(getattr(self, section), **keys) for section, keys in sections.items()}
        )


def flatten(values: dict) -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}, two levels deep as Config is."""
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def field_types() -> dict[str, object]:
    """{"section.field": type} of every field of Config."""
    sections = typing.get_type_hints(Config)
    return {
        f"{section}.{key}": kind
        for section, cls in sections.items()
        for key, kind in typing.get_type_hints(cls).items()
    }


def unknown_field(name: str) -> str:
    """The message for a field that does not exist, with the nearest that do."""
    names = list(field_types())
    near = [known for known in names if known.split(".")[1] == name.split(".")[-1]]
    near = near or difflib.get_close_matches(name, names, n=2, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(typing.get_type_hints(Config))}"
    return f"{name}: no such field; {hint}"


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{"section.field": (old, new)} where two configs differ."""
    a, b = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def _fits(value: object, kind: object) -> bool:
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return any(_fits(value, k) for k in typing.get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind is float:  # an int is a fine float; a bool is neither
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind


def describe_type(kind: object) -> str:
    """How a field's type is called in messages."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return " or ".join(describe_type(k) for k in typing.get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    return {float: "a finite number", int: "an integer", str: "text", bool: "True or False", types.NoneType: "None"}[
        kind
    ]


# Fields that may be zero; every other number must be positive.
_MAY_BE_ZERO = {
    "model.first_k_dense_replace", "model.n_shared_experts", "optim.final_learning_rate", "optim.warmup_tokens",
    "optim.weight_decay", "optim.momentum", "optim.adam_b1", "optim.adam_b2", "optim.router_bias_rate",
    "data.seed", "data.read_threads", "train.seed",
}  # fmt: skip
# (jax.random.key would drop the higher bits of a seed)
_BELOW = {"optim.momentum": 1, "optim.adam_b1": 1, "optim.adam_b2": 1, "train.seed": 2**32}


def _own_problems(values: dict) -> dict[str, str]:
    """{field: problem} of the fields that are wrong whatever the others are."""
    problems = {}
    for name, kind in field_types().items():
        value = values[name]
        least = "at least 0" if name in _MAY_BE_ZERO else "greater than 0"
        if not _fits(value, kind):
            problems[name] = f"must be {describe_type(kind)}"
        elif isinstance(value, (bool, str)) or value is None:
            continue
        elif value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            problems[name] = f"must be {least}"
        elif value >= _BELOW.get(name, math.inf):
            problems[name] = f"must be below {_BELOW[name]}"
    return {name: f"{name} = {values[name]!r}: {rule}" for name, rule in problems.items()}


# (a field, the fields whose product must divide it). Explicit shardings need every cut dim to divide evenly.
_MULTIPLES = [
    ("model.n_routed_experts", ["mesh.expert"]),
    ("model.num_attention_heads", ["mesh.tensor"]),
    ("model.hidden_size", ["mesh.fsdp"]),
    ("model.q_lora_rank", ["mesh.fsdp"]),
    ("model.kv_lora_rank", ["mesh.fsdp"]),
    ("model.qk_rope_head_dim", [2]),  # RoPE turns pairs
    ("data.sequence_length", ["mesh.context", "mesh.tensor"]),
    ("data.batch_sequences", ["train.num_microbatches", "mesh.replica", "mesh.fsdp", "mesh.expert"]),
    ("train.eval_sequences", ["mesh.replica", "mesh.fsdp", "mesh.expert"]),
]
# (a field, the field it must not exceed)
_AT_MOST = [
    ("model.first_k_dense_replace", "model.num_hidden_layers"),
    ("model.num_experts_per_tok", "model.n_routed_experts"),
    ("optim.warmup_tokens", "optim.constant_until_tokens"),
    ("optim.constant_until_tokens", "optim.cosine_until_tokens"),
    ("optim.final_learning_rate", "optim.learning_rate"),
]


def _fit_problems(values: dict):
    """Rules between fields; a rule is passed over where one of its fields is wrong in itself and so absent here."""
    for name, divisors in _MULTIPLES:
        sizes = [values.get(d) if isinstance(d, str) else d for d in divisors]
        if name not in values or None in sizes or values[name] % (divisor := math.prod(sizes)) == 0:
            continue
        value = values[name]
        near = [n for n in (value // divisor * divisor, (value // divisor + 1) * divisor) if n > 0]
        rule = f"must be a multiple of {' * '.join(map(str, divisors))} = {divisor}"
        yield f"{name} = {value}: {rule}; nearest: {' or '.join(map(str, near))}"
    for name, limit in _AT_MOST:
        if name in values and limit in values and values[name] > values[limit]:
            yield f"{name} = {values[name]}: must be at most {limit} = {values[limit]}"
