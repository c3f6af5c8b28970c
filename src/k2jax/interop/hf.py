"""Published checkpoints of the DeepSeek-V3 family as models of k2jax: `load_hf`, and `import_hf` to a run directory."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from k2jax.config import Config, MeshConfig, ModelConfig, PhasesConfig
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.errors import UserError, first_of
from k2jax.files import must_be_new, read_json, whole_folder
from k2jax.inference.load import LoadedModel
from k2jax.inference.mesh import DECODING_AXES, inference_mesh
from k2jax.interop.hf_config import misspelled, model_config, shown
from k2jax.interop.published import SCALE, all_weights, published_names, published_shape, read_part
from k2jax.interop.published_tokenizer import published_tokenizer
from k2jax.interop.safetensor_files import StoredTensor, find_tensors
from k2jax.model.transformer import Transformer, build_model
from k2jax.model.weights import Weight, weight_leaves
from k2jax.runs.folder import RunFolder, path_problem, write_config
from k2jax.runs.identity import make_identity
from k2jax.sharding.names import AXES
from k2jax.train.checkpoint import save_model
from k2jax.train.state import TrainState

FLOATS = ("F32", "BF16", "F16")
SCALES = ("F32", "BF16", "F8_E8M0")  # all exact in float32; the last is a power of two in one byte
STALE = ".rotary_emb.inv_freq"  # buffers that K2's checkpoint still holds; RoPE is computed from config.json


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint folder, looked at and found sound; nothing of its weights is read yet."""

    folder: Path
    config: dict  # config.json
    model: ModelConfig
    rope: Literal["plain", "yarn"]
    tensors: dict[str, StoredTensor]

    @property
    def block(self) -> tuple[int, int]:
        return tuple((self.config.get("quantization_config") or {}).get("weight_block_size", (128, 128)))


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: {'has no config.json' if folder.is_dir() else 'no such folder'}")
    values = read_json(path, follow_links=True)  # a hub's cache is made of links
    if isinstance(values, dict) and "checkpoint" in values and "optim" in values:
        raise UserError(
            f"{folder}: is a run of k2jax already, not a published checkpoint; `k2jax export` makes one of it"
        )
    quantization = isinstance(values, dict) and (values.get("quantization_config") or {})
    if not isinstance(values, dict) or not isinstance(quantization, dict):
        raise UserError(f"{path}: must hold an object, and so must its quantization_config")
    method, block = quantization.get("quant_method", "fp8"), quantization.get("weight_block_size", [128, 128])
    problems = misspelled("config.json: quantization_config", quantization, ("quant_method", "weight_block_size"))
    if method != "fp8":
        problems.append(
            f"config.json: quant_method = {shown(method)}: must be 'fp8' with block scales, or no quantization"
        )
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        problems.append(f"config.json: weight_block_size = {shown(block)}: must be two positive integers")
    if problems:
        raise UserError(*problems)
    return values


def _tensor_problems(weight: Weight, name: str, tensors: dict[str, StoredTensor], block: tuple[int, int]):
    tensor, scale, shape = tensors.get(name), tensors.get(name + SCALE), published_shape(weight)
    if tensor is None:
        yield f"{name}: is missing, {list(shape)}"
        return
    if tensor.shape != shape:
        turned = "; it is transposed" if tensor.shape == shape[::-1] else ""
        yield f"{name}: has shape {list(tensor.shape)}, must have {list(shape)}{turned}"
    allowed = ("F8_E4M3",) if scale else FLOATS
    if tensor.dtype not in allowed:
        reason = f"beside {name + SCALE}" if scale else "(F8_E4M3 needs its scales)"
        yield f"{name}: is {tensor.dtype}, must be {' or '.join(allowed)} {reason}"
    if scale:
        blocks = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
        if scale.shape != blocks or scale.dtype not in SCALES:
            found = f"{name + SCALE}: is {scale.dtype} {list(scale.shape)}"
            yield f"{found}, must be {' or '.join(SCALES)} {list(blocks)}"


def _check_tensors(model: ModelConfig, tensors: dict[str, StoredTensor], block: tuple[int, int]) -> None:
    """Raise UserError with every tensor that is missing, unknown, misshaped or of a wrong dtype."""
    problems, known, weights = [], set(), weight_leaves(all_weights(model))
    count = sum(math.prod(weight.shape[: weight.num_stack]) for weight in weights)
    if count > 4 * len(tensors) + 1000:  # a number of layers or experts that is not meant: too many names to list
        sizes = f"num_hidden_layers = {model.num_hidden_layers}, n_routed_experts = {model.n_routed_experts}"
        raise UserError(f"config.json: {sizes}: such a network has {count} tensors, the files hold {len(tensors)}")
    for weight in weights:
        for _, name in published_names(weight):
            problems += _tensor_problems(weight, name, tensors, block)
            known |= {name, name + SCALE}
    unused = [name for name in tensors if name not in known and not name.endswith(STALE)]
    problems += [f"{name}: no weight of this network has that name" for name in unused]
    if problems:
        raise UserError(*first_of(problems))


def _mtp_layers(values: dict, model: ModelConfig, tensors: dict[str, StoredTensor]) -> list[int]:
    """Numbers of the layers after the last one, which are for multi-token prediction, from what the files hold.

    The field that counts them is often dropped or wrong in conversions. UserError if it is not a count.
    """
    count = values.get("num_nextn_predict_layers")
    if count is not None and (type(count) is not int or count < 0):
        raise UserError(f"config.json: num_nextn_predict_layers = {shown(count)}: must be an integer of at least 0")
    layers = model.num_hidden_layers
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d{1,6})\.", name))}
    extra = sorted(number for number in numbers if number >= layers)
    # A layer for multi-token prediction has two more norms. Others are dropped only as many as the field says, or one:
    # with a wrong num_hidden_layers they are layers of the network itself.
    ordinary = [number for number in extra if f"model.layers.{number}.enorm.weight" not in tensors]
    if ordinary and len(extra) > (1 if count is None else count):
        rule = "must cover them, unless they are for multi-token prediction, which num_nextn_predict_layers then counts"
        raise UserError(
            f"config.json: num_hidden_layers = {layers}: the files hold layers {layers} to {extra[-1]}; {rule}"
        )
    return extra


def open_published(directory: str | Path, drop_mtp: bool = False) -> PublishedCheckpoint:
    """Look at a checkpoint folder. Raises UserError with all that is wrong with its config, or else with its tensors.

    drop_mtp: leave out the layers for multi-token prediction that DeepSeek-V3's checkpoint holds after the others.
    """
    folder = Path(directory)
    values = _read_config(folder)
    model, rope = model_config(values)
    folder = folder.resolve()
    found = PublishedCheckpoint(folder, values, model, rope, find_tensors(folder))
    extra = _mtp_layers(values, model, found.tensors)
    mtp = tuple(f"model.layers.{layer}." for layer in extra)
    if drop_mtp:
        found = dataclasses.replace(found, tensors={n: t for n, t in found.tensors.items() if not n.startswith(mtp)})
    elif num := sum(name.startswith(mtp) for name in found.tensors):
        raise UserError(
            f"{folder}: {num} tensors of {'layers' if len(extra) > 1 else 'layer'} {', '.join(map(str, extra))}, after "
            f"the {model.num_hidden_layers} of config.json, are for multi-token prediction, which k2jax does not have; "
            "leave them out with --drop-mtp (drop_mtp=True)"
        )
    _check_tensors(model, found.tensors, found.block)
    return found


def _check_mesh(model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        raise UserError(
            f"mesh with axes {', '.join(mesh.axis_names)}: must have {', '.join(AXES)}, all Explicit; "
            "k2jax.mesh_of(expert=4, tensor=2) makes one"
        )
    config = Config(model=model, mesh=MeshConfig(**mesh.shape))
    problems = [problem for problem in config.problems() if problem.startswith("model.")]
    if problems:
        raise UserError(*problems)


def load_values(found: PublishedCheckpoint, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None) -> dict:
    """{"params", "router_bias"}: each device's part is read from the files by itself. The router bias is float32."""

    def load(weight: Weight) -> jax.Array:
        own = np.dtype(jnp.float32 if weight.group is None else dtype)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return read_part(weight, index, found.tensors, found.block, own)

        if mesh is None:
            return jnp.asarray(part((slice(None),) * len(weight.shape)))
        spec = weight.spec(mesh.shape) if weight.group else jax.P()
        return jax.make_array_from_callback(weight.shape, jax.NamedSharding(mesh, spec), part)

    return jax.tree.map(load, all_weights(found.model), is_leaf=lambda x: isinstance(x, Weight))


def load_hf(
    directory: str | Path,
    dtype: jnp.dtype = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    drop_mtp: bool = False,
) -> Transformer:
    """The model of a published checkpoint (`deepseek_v3` or `kimi_k2`), computing and stored in `dtype`.

    `out = model(tokens)` with int32 [B, T]: out.logits [B, T, V], out.report.max_logits [layers, heads] and
    out.report.expert_load [MoE layers, experts]. mesh: where the weights go, by default where `jax.set_mesh` says; call
    the model under that mesh.
    Positions are turned as config.json says, with YaRN at every length where it has a scaling, as transformers does.
    Block-FP8 weights are multiplied by their scales. Raises UserError with every tensor that does not fit.
    """
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating) or dtype is None:
        raise UserError(f"dtype = {dtype!r}: must be a float type, such as 'float32' or 'bfloat16'")
    found = open_published(directory, drop_mtp)
    current = jax.sharding.get_mesh()
    mesh = mesh if mesh is not None or current.empty else current
    if mesh is not None:
        _check_mesh(found.model, mesh)
        if mesh.shape["stage"] > 1:
            rule = "must be 1 for a model to call; stages are for training alone"
            raise UserError(f"mesh.stage = {mesh.shape['stage']}: {rule}")
    values = load_values(found, kind, mesh)
    return build_model(found.model, values["params"], values["router_bias"], kind, rope=found.rope)


def _config_for(found: PublishedCheckpoint, run_dir: str) -> Config:
    """A config around a published network: what using it takes is right, what training takes is to be chosen."""
    phases = PhasesConfig(start_tokens=(0,), rope=(found.rope,), router_bias_rate=(1e-3,), balance_alpha=(1e-4,))
    half = found.config.get("torch_dtype", found.config.get("dtype")) in ("bfloat16", "float16")
    return Config(model=found.model, phases=phases).replace(
        {
            "data.sequence_length": found.config.get("max_position_embeddings", 4096),
            "train.run_dir": run_dir,
            "train.compute_dtype": "bfloat16" if half else "float32",
        }
    )


def load_published(
    directory: str | Path,
    drop_mtp: bool = False,
    sizes: MeshConfig | None = None,
    axes: tuple[str, ...] = DECODING_AXES,
) -> LoadedModel:
    """A checkpoint folder ready for generation and evaluation, in the dtype that its config.json names.

    sizes, axes: as of `load_run`. Raises UserError as `load_hf` does, and for a mesh that does not go with the model.
    """
    found = open_published(directory, drop_mtp)
    config = _config_for(found, "none")
    mesh = None if sizes is None else inference_mesh(sizes, config.model, axes)
    values = load_values(found, jnp.dtype(config.train.compute_dtype), mesh)
    state = TrainState(np.int32(0), values["params"], values["router_bias"], None, None)
    return LoadedModel(str(directory), config, state, published_tokenizer(found.folder, found.config), mesh)


def import_hf(directory: str | Path, run_dir: str | Path, mesh: jax.sharding.Mesh, drop_mtp: bool = False) -> Config:
    """Make a run directory of a published checkpoint, with float32 parameters as its step 0; the config written to it.

    It can be generated from, evaluated and exported, and `train.init_from` begins a training with it. It appears whole
    or not at all. Raises UserError as `load_hf` does, and where `run_dir` exists or is a URL.
    """
    must_be_new(run_dir)
    run_dir = Path(run_dir)
    if rule := path_problem(run_dir):
        raise UserError(f"--to {str(run_dir)!r}: {rule}; give another")
    found = open_published(directory, drop_mtp)
    _check_mesh(found.model, mesh)
    tokenizer, config = published_tokenizer(found.folder, found.config), _config_for(found, str(run_dir)).validate()
    with whole_folder(run_dir, "importing") as aside:
        write_config(aside, config)
        make_identity(aside)
        save_model(RunFolder(aside).checkpoints, load_values(found, jnp.dtype(jnp.float32), mesh))
        if tokenizer is not None:
            save_tokenizer(tokenizer, RunFolder(aside).tokenizer)
    return config
