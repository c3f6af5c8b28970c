"""config.json of the DeepSeek-V3 family (K2, DeepSeek-V3, Moonlight) to a ModelConfig and back.

Fields of ModelConfig keep their published names, so most of the mapping is the identity. What the network of k2jax
has no form for is refused, never dropped.
"""

import dataclasses
import difflib
import math
from typing import Literal

from k2jax.config import Config, ModelConfig, RopeConfig
from k2jax.errors import UserError, first_of

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
# What the published files hold besides, and the only value that this network stands for (None: the field is free).
_FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_DTYPES = ("float32", "bfloat16", "float16")
_COPIED = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("rope", "initializer_range")]
_OPTIONAL = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}
_YARN = {
    "factor": None,
    "original_max_position_embeddings": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
_ROPE = (*_YARN, "rope_theta", "rope_type", "type", "attention_factor", "partial_rotary_factor", "truncate")
_KNOWN = (
    *(*_COPIED, *_FIXED, "model_type", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config"),
    *("bos_token_id", "eos_token_id", "num_nextn_predict_layers", "num_key_value_heads", "max_position_embeddings"),
)


def shown(value: object) -> str:
    """A value of a file for a message: its repr, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def misspelled(where: str, values: dict, known: tuple[str, ...]) -> list[str]:
    """Problems of names that are nearly a known one which is absent, and whose default would take its place unseen."""
    absent = [name for name in known if name not in values]
    near = {
        name: difflib.get_close_matches(name, [right for right in absent if abs(len(right) - len(name)) < 3], 1, 0.85)
        for name in values
        if name not in known
    }
    return [
        f"{where}: {shown(name)}: is not a known field; nearest: {found[0]!r}" for name, found in near.items() if found
    ]


def _wrong_kinds(values: dict) -> list[str]:
    """Problems of fields that hold no number, or one beyond 64 bits, which nothing can be compared with."""
    problems = [
        f"config.json: {name} = {shown(values[name])}: must be a number{' or null' if name in _OPTIONAL else ''}"
        for name in (*_COPIED, "rope_theta")
        if not isinstance(values.get(name), (int, float, type(None)))
    ]
    return problems + [
        f"config.json: {name} = {shown(value)}: must be less than 2**63"
        for name, value in values.items()
        if isinstance(value, int) and abs(value) >= 2**63
    ]


def _rope_kind(values: dict) -> tuple[str, list[str]]:
    """(RoPE type, problems) of the two dicts, where `rope_scaling` comes first, as in transformers."""
    kinds, problems = {}, []
    for name in ("rope_scaling", "rope_parameters"):
        given = values[name]
        found = {key: given[key] for key in ("rope_type", "type") if given.get(key) is not None}
        if len({*map(str, found.values())}) > 1:
            both = " and ".join(f"{key} = {shown(value)}" for key, value in found.items())
            problems.append(f"config.json: {name} says {both}; must agree")
        elif found:
            kinds[name] = next(iter(found.values()))
        elif given and name == "rope_scaling":
            problems.append("config.json: rope_scaling has no type; must be 'yarn', or the field absent")
    kind = kinds.get("rope_scaling", kinds.get("rope_parameters", "default"))
    # transformers writes "default" there for a file without a scaling; one that is then added counts.
    if (newer := kinds.get("rope_parameters", "default")) not in ("default", kind):
        problems.append(f"config.json: rope_scaling is {shown(kind)}, rope_parameters {shown(newer)}; must agree")
    if kind not in ("default", "yarn"):
        problems.append(f"config.json: rope type {shown(kind)}: must be 'yarn' or 'default'")
    return kind, problems


def _wrong_rope_entries(source: str, entries: dict) -> list[str]:
    """Problems of a RoPE dict's names and values; a name that is not known may mean other positions."""
    unknown = [name for name, value in entries.items() if name not in _ROPE and value is not None]
    problems = [
        f"config.json: {source} has {shown(name)}, which k2jax has no form for; must be absent" for name in unknown
    ]
    return problems + [
        f"config.json: {source} has {name} = {shown(entries[name])}: must be a number less than 2**63"
        for name in (*_YARN, "rope_theta", "attention_factor", "partial_rotary_factor")
        if not isinstance(value := entries.get(name), (int, float, type(None)))
        or (isinstance(value, int) and abs(value) >= 2**63)
    ]


def _rope_of(values: dict) -> tuple[RopeConfig, Literal["plain", "yarn"], list[str]]:
    """(rope, kind, problems) from rope_theta and rope_scaling, or from transformers' newer rope_parameters."""
    dicts = {name: values.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    if wrong := [name for name, value in dicts.items() if not isinstance(value, dict)]:
        return (
            RopeConfig(),
            "plain",
            [f"config.json: {name} = {shown(values[name])}: must be an object" for name in wrong],
        )
    kind, problems = _rope_kind(dicts)
    for source, entries in dicts.items():
        problems += _wrong_rope_entries(source, entries)
    given = {}
    for source, entries in {"config.json": {"rope_theta": values.get("rope_theta")}, **dicts}.items():
        for name, value in entries.items():
            if value is None or name in ("type", "rope_type"):
                continue
            if name in given and given[name][1] != value:
                beside = f"{given[name][0]} has {shown(given[name][1])}"
                problems.append(f"config.json: {source} has {name} = {shown(value)}, {beside}; must be the same")
            given.setdefault(name, (source, value))
    given = {name: value for name, (_, value) in given.items()}
    theta = given.get("rope_theta")
    if theta is None:
        problems.append("config.json: rope_theta: is missing")
    yarn = {name: given.get(name, default) for name, default in _YARN.items()} if kind == "yarn" else {"factor": None}
    if kind == "yarn":
        problems += [f"config.json: {name} of the rope scaling: is missing" for name, v in yarn.items() if v is None]
    problems += [
        f"config.json: {name} = {shown(given[name])} of the rope scaling: k2jax has no form for it; must be absent"
        for name, neutral in (("attention_factor", None), ("partial_rotary_factor", 1))
        if given.get(name, neutral) != neutral
    ]
    if given.get("truncate", True) is not True:
        problems.append("config.json: truncate = False of the rope scaling: k2jax rounds the ramp; must be true")
    if problems:
        return RopeConfig(), "plain", problems
    return RopeConfig(rope_theta=theta, **yarn), "plain" if kind == "default" else "yarn", problems


def model_config(values: dict) -> tuple[ModelConfig, Literal["plain", "yarn"]]:
    """The network that a config.json describes, and its RoPE. Raises UserError with everything that does not fit."""
    if problems := _wrong_kinds(values):
        raise UserError(*first_of(problems))
    rope, kind, problems = _rope_of(values)
    problems += misspelled("config.json", values, _KNOWN)
    found = values.get("model_type")
    if found not in MODEL_TYPES:
        problems.append(f"config.json: model_type = {shown(found)}: must be one of {', '.join(map(repr, MODEL_TYPES))}")
    problems += [
        f"config.json: {name} = {shown(values[name])}: must be {fixed!r}, the network of k2jax has no other form"
        for name, fixed in _FIXED.items()
        if values.get(name, fixed) != fixed
    ]
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") not in (None, heads):
        problems.append(
            f"config.json: num_key_value_heads = {shown(values['num_key_value_heads'])}: must be {heads}, as MLA has"
        )
    length, dtype = values.get("max_position_embeddings", 1), values.get("torch_dtype", values.get("dtype"))
    if type(length) is not int or length < 1:
        problems.append(
            f"config.json: max_position_embeddings = {shown(length)}: must be a positive integer, or absent"
        )
    if dtype is not None and dtype not in _DTYPES:
        rule = f"must be one of {', '.join(map(repr, _DTYPES))}, or absent"
        problems.append(f"config.json: torch_dtype = {shown(dtype)}: {rule}")
    fields = {}
    for name in _COPIED:
        value = values.get(name)
        if value is None and name not in _OPTIONAL:
            problems.append(f"config.json: {name}: is missing")
        else:
            fields[name] = _OPTIONAL.get(name) if value is None else value
    model = dataclasses.replace(ModelConfig(rope=rope), **fields)
    own = Config(model=model).problems()
    problems += [f"config.json: {p.removeprefix('model.')}" for p in own if p.startswith("model.")]
    if problems:
        raise UserError(*first_of(problems))
    return model, kind


def _rope_fields(model: ModelConfig, rope: str) -> dict:
    """The scaling under both names: mlx-lm reads `rope_scaling` alone, transformers 5 `rope_parameters`."""
    theta = model.rope.rope_theta
    if rope == "plain":
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    scaling = {name: getattr(model.rope, name) for name in _YARN}
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": "yarn", **scaling},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **scaling},
    }


def hf_config(
    model: ModelConfig, rope: Literal["plain", "yarn"], max_length: int, dtype: str, bos: int | None, eos: int | None
) -> dict:
    """config.json for a model of ours: what transformers 5 and mlx-lm need to run the very same network.

    model_type is "deepseek_v3" for K2 too: transformers does not register "kimi_k2" and would leave all experts random.
    max_length: tokens that plain RoPE was trained with. Raises UserError for a network without a published form.
    """
    if not model.n_shared_experts:
        raise UserError("model.n_shared_experts = 0: the published form always has shared experts; must be at least 1")
    stretched = math.floor(model.rope.factor * model.rope.original_max_position_embeddings) if rope == "yarn" else 0
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: getattr(model, name) for name in _COPIED},
        **{name: value for name, value in _FIXED.items()},
        "num_key_value_heads": model.num_attention_heads,
        "initializer_range": model.initializer_range,
        **_rope_fields(model, rope),
        "max_position_embeddings": stretched or max_length,
        "num_nextn_predict_layers": 0,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "use_cache": True,
    }
