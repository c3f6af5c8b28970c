"""A run as frozen dataclasses in sections, checked once, stored as JSON.

Model fields carry the names of the published `config.json` of the DeepSeek-V3 family, and every default
is Kimi K2's. Tokens are the unit of the schedule; a step is `data.batch_sequences * data.sequence_length`
tokens. "Off" is None.
"""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from k2jax import config_rules
from k2jax.config_rules import Rule
from k2jax.errors import UserError

T = TypeVar("T")
Free = Annotated[T, Rule(resume=True)]  # may change when a run is resumed
OrZero = Annotated[T, Rule(zero=True)]  # every other number must be greater than 0
Share = Annotated[float, Rule(zero=True, below=1)]
Paths = Annotated[T, Rule(path=True)]
Folder = Annotated[T, Rule(folder=True)]
Seed = Annotated[int, Rule(zero=True, below=2**32)]  # jax.random.key would drop the higher bits
Window = Annotated[int, Rule(least=(2, "since one step has no deviation"))]
# Activations that are saved for the backward pass: model/remat.py.
Remat = Literal["none", "k2", "k2-offload", "layer", "offload"]


@functools.cache
def _sections(cls: type) -> dict[str, type]:
    """{name: class} of the sections that a section has."""
    return {name: kind for name, kind in typing.get_type_hints(cls).items() if dataclasses.is_dataclass(kind)}


def _as_call(cls: type, value: object) -> str:
    """The expression to write for a section that was given as `value`: with the same fields, if they were in a dict."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        example = dataclasses.fields(cls)[0]
        return f"{cls.__name__}({example.name}={example.default!r}), say"
    inner = _sections(cls)
    texts = {
        name: _as_call(inner[name], part) if name in inner and isinstance(part, dict) else repr(part)
        for name, part in value.items()
    }
    return f"{cls.__name__}({', '.join(f'{name}={text}' for name, text in texts.items())})"


class _Section:
    """A dataclass some of whose fields may be sections. One of another type would fail wherever it is read first."""

    def __post_init__(self):
        wrong = {
            name: kind for name, kind in _sections(type(self)).items() if not isinstance(getattr(self, name), kind)
        }
        prefix = next((f"{name}." for name, kind in _sections(Config).items() if isinstance(self, kind)), "")
        problems = []
        for name, kind in wrong.items():
            value = getattr(self, name)
            rule = f"must be a {kind.__name__}; write {_as_call(kind, value)}"
            problems.append(f"{prefix}{name} = {value!r}: {rule}")
        if problems:
            raise UserError(*problems)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions, and how YaRN stretches them (k2-facts 3.3; arXiv 2309.00071). `factor` None: it never does."""

    rope_theta: float = 50_000.0
    factor: float | None = 32.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 1.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: OrZero[float] = 1.0


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Shape of the network (K2's `config.json`)."""

    vocab_size: int = 163_840
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: OrZero[int] = 1  # the first layers have a dense FFN
    num_attention_heads: int = 64
    q_lora_rank: int | None = 1536  # None: queries are made from the hidden state
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 18_432  # dense FFN
    moe_intermediate_size: int = 2048  # one expert
    n_routed_experts: int = 384
    num_experts_per_tok: int = 8
    n_shared_experts: OrZero[int] = 1
    n_group: int = 1  # groups of experts, of which a token uses at most topk_group
    topk_group: int = 1
    routed_scaling_factor: float = 2.827
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    initializer_range: float = 0.006  # DeepSeek-V3 report 4.2; K2's is not published


@dataclass(frozen=True)
class OptimConfig:
    """MuonClip (K2 report, Algorithm 1) and its schedule; see docs/optimizer.md for what K2 leaves open."""

    optimizer: str = "muonclip"  # or a function that makes an optax chain: "FILE.py:function", "module:function"
    learning_rate: float = 2e-4
    final_learning_rate: OrZero[float] = 2e-5
    warmup_tokens: OrZero[int] = 500 * 67_108_864
    constant_until_tokens: int = 10_000_000_000_000
    cosine_until_tokens: int = 15_500_000_000_000
    weight_decay: OrZero[float] = 0.1
    max_grad_norm: float | None = 1.0
    momentum: Share = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: Literal["standard", "dion", "polar_express", "newton"] = "standard"
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    update_rms: float = 0.2
    adam_b1: Share = 0.9
    adam_b2: Share = 0.95
    adam_eps: float = 1e-8
    qk_clip_tau: float | None = 100.0


@dataclass(frozen=True)
class GuardConfig:
    """The rule for bad steps. A bad step changes nothing but the counters: it is skipped, and its batch with it.

    A step whose loss, gradient norm or largest logits are not finite is always bad. The z-scores are in standard
    deviations over the mean of the last `window` good steps, of the loss and of the gradient norm's logarithm; None
    turns a check off.
    """

    window: Window = 128  # steps; before as many have been good, nothing is a spike
    loss_zscore: Free[float | None] = None
    grad_norm_zscore: Free[float | None] = None
    max_skips: Free[int] = 5  # bad steps in a row that end the run
    compare_every: Free[int | None] = None  # steps between comparisons of the copies that devices have of the state


@dataclass(frozen=True)
class PhasesConfig:
    """The phases of a run: entry i of every field holds from `start_tokens[i]` tokens on."""

    start_tokens: OrZero[tuple[int, ...]] = (0, 15_500_000_000_000)  # pretraining, then annealing
    rope: tuple[Literal["plain", "yarn"], ...] = ("plain", "plain")
    router_bias_rate: OrZero[tuple[float, ...]] = (1e-3, 0.0)  # Moonlight's; K2's is not published
    balance_alpha: OrZero[tuple[float, ...]] = (1e-4, 1e-4)  # weight of the sequence-wise loss: DeepSeek-V3 report 4.2


@dataclass(frozen=True)
class KernelsConfig:
    """Implementations of the heavy work. "auto" chooses by platform and mesh; the banner shows the choice."""

    exchange: Literal["auto", "ragged", "dense", "ring"] = "auto"  # how tokens reach their experts: docs/experts.md
    expert_buffer: float | None = None  # rows that a device may receive, in balanced loads; None: all, none is dropped
    grouped_matmul: Literal["auto", "blocked", "ragged_dot", "tokamax"] = "auto"  # the experts' matmul
    attention: Literal["auto", "chunked", "tokamax"] = "auto"  # in chunks, or kernels of TPU and GPU: docs/attention.md
    attention_chunk: int | None = None  # queries, and keys, that attention takes at a time; None: by sequence length
    compiler_options: tuple[str, ...] | None = None  # XLA's, "xla_name=value", beside ours or in their place


@dataclass(frozen=True)
class DataConfig:
    """The tokens, their order, and how they are cut into batches."""

    path: Free[Paths[str]] = "data/tokens"  # token stores, folders or URLs, or .idx files of Megatron; joined by commas
    validation_path: Free[Paths[str | None]] = None  # where the held-out text is; None: in the stores of `path`
    tokenizer: Paths[str | None] = None  # of .idx files, which do not say: as in `k2jax prepare`
    sequence_length: int = 4096
    batch_sequences: int = 16_384
    seed: OrZero[int] = 0
    mask_documents: bool = True  # a token sees its own document alone, and positions begin with each; else the sequence
    packing: Literal["windows", "best_fit"] = "windows"  # slices of the stream, or few cuts: as many whole documents
    fim_rate: Share | None = None  # share of documents shown as prefix, suffix, middle; DeepSeek-V3: 0.1
    fim_tokens: OrZero[tuple[int, ...] | None] = None  # the ids that stand before prefix, suffix and middle
    skip_steps: Free[tuple[str, ...] | None] = None  # steps of data never to be read: "1200-1219", both ends included
    max_bad_rows: Free[OrZero[int]] = 0  # rows of a run that may be replaced for damage or unknown ids: ledger.jsonl
    index_dir: Free[Folder[str]] = "data/indexes"  # what is computed once for a store: packings, digests of .idx files
    read_threads: Free[OrZero[int]] = 4
    prefetch_sequences: Free[int] = 256


@dataclass(frozen=True)
class MixtureConfig:
    """The share of rows of each source. A source that runs out begins again, in a new order."""

    # Of each phase, or one for all: "web=70 code=30", integers; or "natural", as many as each source has tokens.
    weights: tuple[str, ...] = ("natural",)
    epochs: str | None = None  # most passes over a source: "web=1 wiki=10"; None: as many as the run takes
    max_repeats: int | None = None  # most times that any document is seen, its rephrased variants counted


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; all axes are always there."""

    replica: int = 1  # copies of the model, over the slow network
    stage: int = 1  # pipeline stages: the MoE layers, in their order
    fsdp: int = 1  # cuts every matrix at rest
    expert: int = 1  # experts
    tensor: int = 1  # attention heads; tokens elsewhere
    context: int = 1  # positions of a sequence


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    run_dir: Free[Paths[str]] = "runs/k2"  # a folder, or gs://BUCKET/RUN or s3://BUCKET/RUN: docs/hosts.md
    num_steps: Free[int] = 230_968
    num_microbatches: Free[int] = 1
    microbatches_together: Free[int | None] = None  # that pass the pipeline's stages in one go; None: all of a step
    init_from: Paths[str | None] = None  # another run, or an imported one, whose newest model is the start
    seed: Seed = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Free[Remat] = "layer"  # what the backward pass does not make again: docs/memory.md
    compile_cache: Free[Folder[str | None]] = "compiled"  # compiled programs, seen from run_dir; None: none is kept
    self_check: Free[Literal["auto", "on", "off"]] = "auto"  # kernels, exchange, at the start; auto: if many processes
    log_every: Free[int] = 1  # steps between plain progress lines; metrics.jsonl has every step
    log_ranks: Free[bool] = False  # processes other than the first log to ranks/N.log of the run directory
    replay_bound: Free[OrZero[float | None]] = None  # of a restart: how far the loss of a step done again may be off
    eval_every: Free[int | None] = None  # steps between validations; the end is always validated
    eval_sequences: Free[int] = 256


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept. Step 0 and the last step are always saved."""

    save_every: int = 500
    keep_last: int = 3
    keep_every: int | None = None  # saves whose step this divides are kept for good
    save_timeout_seconds: int = 1200


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds without a sign of life after which a process is stuck, and the run ends with exit code 124. None: any."""

    step_seconds: int | None = 900  # of a step with its batch
    phase_seconds: int | None = 7200  # of anything else: a restore, a compile, an evaluation, what a save holds up


@dataclass(frozen=True)
class Config(_Section):
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    kernels: Free[KernelsConfig] = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixture: Free[MixtureConfig] = field(default_factory=MixtureConfig)
    mesh: Free[MeshConfig] = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: Free[CheckpointConfig] = field(default_factory=CheckpointConfig)
    watchdog: Free[WatchdogConfig] = field(default_factory=WatchdogConfig)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step."""
        return self.data.batch_sequences * self.data.sequence_length

    def validate(self) -> "Config":
        """Return self, or raise UserError with every violated rule."""
        if problems := self.problems():
            raise UserError(*problems)
        return self

    def problems(self) -> list[str]:
        """Every violated rule."""
        kinds, rules = field_types(type(self)), field_rules(type(self))
        values = {name: functools.reduce(getattr, name.split("."), self) for name in kinds}
        return list(config_rules.problems(values, kinds, rules))

    def to_json(self) -> dict:
        """The sections as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(where: str | Path, sections: object) -> "Config":
        """Inverse of `to_json`, of values read from `where`; UserError with all unknown, missing or ill-typed fields."""
        if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
            raise UserError(f"{where}: must be an object whose values, the sections, are objects")
        values = flatten(sections)
        known = field_types()
        problems = [unknown_field(name) for name in values if name not in known]
        problems += [f"{name}: is missing" for name in known if name not in values]
        if problems:
            raise UserError(*problems)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Config().replace(values).validate()

    def replace(self, values: dict[str, object]) -> "Config":
        """A copy with `{"section.field": value}` set, or `{"section": value}`. UserError for unknown names."""
        known = field_types(type(self)).keys() | section_names(type(self))
        if problems := [unknown_field(name, type(self)) for name in values if name not in known]:
            raise UserError(*problems)
        return _replace(self, values)


def _replace(part, values: dict[str, object]):
    own, inner = {}, {}
    for name, value in values.items():
        key, _, rest = name.partition(".")
        if rest:
            inner.setdefault(key, {})[rest] = value
        else:
            own[key] = value
    part = dataclasses.replace(part, **own)  # sections first, then fields of them
    return dataclasses.replace(part, **{key: _replace(getattr(part, key), keys) for key, keys in inner.items()})


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1, "c": {"d": 2}}} -> {"a.b": 1, "a.c.d": 2}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _fields(cls: type, prefix: str = "", rule: Rule = Rule()) -> Iterator[tuple[str, object, Rule]]:
    """(name, type, rule) of every field of a section; a section's own rule holds for all its fields."""
    plain = typing.get_type_hints(cls)
    for key, hint in typing.get_type_hints(cls, include_extras=True).items():
        parts = [hint, *typing.get_args(hint)] if typing.get_origin(hint) in config_rules.UNIONS else [hint]
        found = [m for part in parts for m in getattr(part, "__metadata__", ()) if isinstance(m, Rule)]
        own = functools.reduce(Rule.joined, found, rule)
        if dataclasses.is_dataclass(plain[key]):
            yield from _fields(plain[key], f"{prefix}{key}.", own)
        else:
            yield prefix + key, plain[key], own


@functools.cache
def field_types(cls: type | None = None) -> dict[str, object]:
    """{"section.field": type} of every field of Config, or of a class derived from it."""
    return {name: kind for name, kind, _ in _fields(cls or Config)}


@functools.cache
def field_rules(cls: type | None = None) -> dict[str, Rule]:
    """{"section.field": its Rule}."""
    return {name: rule for name, _, rule in _fields(cls or Config)}


def section_names(cls: type | None = None, prefix: str = "") -> dict[str, type]:
    """{"section" or "section.section": its class} of Config, or of a class derived from it."""
    names = {}
    for name, kind in _sections(cls or Config).items():
        names |= {prefix + name: kind} | section_names(kind, f"{prefix}{name}.")
    return names


def unknown_field(name: str, cls: type | None = None) -> str:
    """The message for a field that does not exist, with the nearest that do."""
    names = list(field_types(cls))
    if name in section_names(cls):
        return f"{name}: is a section; give its fields, such as {next(n for n in names if n.startswith(name + '.'))}"
    near = [known for known in names if known.split(".")[-1] == name.split(".")[-1]]
    near = near or difflib.get_close_matches(name, [*names, *section_names(cls)], n=2, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(_sections(cls or Config))}"
    return f"{name}: no such field; {hint}"


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{"section.field": (old, new)} where two configs differ."""
    a, b = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}
