"""The optimizer that a config names, checked against the model before a run begins; and how its state is laid out."""

import importlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr
from jax.sharding import PartitionSpec as P

from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim.assignment import make_assignments
from k2jax.optim.muon import MuonState
from k2jax.optim.qk_clip import QKClipState
from k2jax.optim.setup import Setup, map_weights, muonclip_of
from k2jax.sharding.place import on_mesh
from k2jax.train.update_trace import not_clipped
from k2jax.user_code import run_file


def find_function(name: str) -> Callable[[Setup], optax.GradientTransformation]:
    """The function that `optim.optimizer` names. Raises UserError if there is none."""
    if name == "muonclip":
        return muonclip_of
    place, _, function = name.rpartition(":")
    field = f"optim.optimizer = {name!r}"
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"{field}: there is no file {place} (seen from {Path.cwd()})")
    try:
        names = run_file(place) if place.endswith(".py") else vars(importlib.import_module(place))
    except Exception as error:  # the code is the user's: whatever it raises is theirs to mend
        raise UserError(f"{field}: {place} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(names.get(function)):
        own = [key for key, value in names.items() if callable(value) and getattr(value, "__module__", "") in
               (place, "<run_path>")]  # fmt: skip
        raise UserError(f"{field}: {place} has no function {function}" + (f"; there are {', '.join(own)}" * bool(own)))
    return names[function]


def call_update(tx: optax.GradientTransformation, grads, state, params, **extra):
    """tx.update with those of the extra arguments that it takes: not every transform ignores the others."""
    takes = inspect.signature(tx.update).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in takes.values()):
        extra = {name: value for name, value in extra.items() if name in takes}
    return tx.update(grads, state, params, **extra)


def _shapes(weights) -> dict:
    return map_weights(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), weights)


def _build(config: Config, weights, assignments) -> optax.GradientTransformation:
    """Call the function. Raises UserError for what it raises, and where it returns something else."""
    field = f"optim.optimizer = {config.optim.optimizer!r}"
    function = find_function(config.optim.optimizer)
    try:
        tx = function(Setup(config.optim, weights, config.batch_tokens, assignments))
    except Exception as error:
        raise UserError(f"{field}: {type(error).__name__}: {error}") from None
    if isinstance(tx, optax.MultiSteps):
        raise UserError(f"{field}: {_MULTI_STEPS}")
    if not isinstance(tx, optax.GradientTransformation):
        raise UserError(f"{field}: must return an optax.GradientTransformation, got {type(tx).__name__}")
    return tx


_MULTI_STEPS = (
    "optax.MultiSteps hides all but its last call's max_logits from QK-Clip, and its updates are fewer than the steps "
    "that the schedule counts; use train.num_microbatches, or a larger data.batch_sequences"
)


def _nodes(state, kinds) -> list:
    """The parts of an optimizer's state that are of one of these kinds, outermost ones alone."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _abstract_state(config: Config, tx: optax.GradientTransformation, weights) -> optax.OptState:
    """ShapeDtypeStructs of the state. Raises UserError if init() fails."""
    try:
        return jax.eval_shape(tx.init, _shapes(weights))
    except Exception as error:  # the code is the user's
        raise UserError(f"optim.optimizer = {config.optim.optimizer!r}: {type(error).__name__}: {error}") from None


def _traced(config: Config, tx: optax.GradientTransformation, weights, state: optax.OptState) -> Jaxpr:
    """One update of abstract parameters without a mesh. Raises UserError if it fails, or has other shapes."""
    field, params = f"optim.optimizer = {config.optim.optimizer!r}", _shapes(weights)
    shape = config.model.num_hidden_layers, config.model.num_attention_heads
    loss, max_logits = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)

    def update(grads, state, params, loss, max_logits):
        return call_update(tx, grads, state, params, value=loss, grad=grads, max_logits=max_logits)[0]

    try:
        jaxpr, updates = jax.make_jaxpr(update, return_shape=True)(params, state, params, loss, max_logits)
    except Exception as error:
        raise UserError(f"{field}: {type(error).__name__}: {error}") from None
    if jax.tree.map(lambda x: x.shape, updates) != jax.tree.map(lambda x: x.shape, params):
        raise UserError(f"{field}: its updates are not shaped like the parameters")
    return jaxpr.jaxpr


def _check(config: Config, tx: optax.GradientTransformation, weights) -> None:
    """Raise UserError if one traced update fails, leaves a parameter without an update, or clips in some steps only."""
    field, tau = f"optim.optimizer = {config.optim.optimizer!r}", config.optim.qk_clip_tau
    state = _abstract_state(config, tx, weights)
    jaxpr = _traced(config, tx, weights, state)
    leaves = jax.tree.leaves_with_path(weights, is_leaf=lambda x: isinstance(x, Weight))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    bare = [path for path, out, own in zip(paths, jaxpr.outvars, jaxpr.invars, strict=False) if out is own]
    problems = [f"{field}: {path} is given its bare gradient: no transform of the chain has this parameter" for path
                in bare]  # fmt: skip
    clips = bool(_nodes(state, QKClipState))
    if clips != (tau is not None):
        has, rule = ("has a qk_clip", "give its tau") if clips else ("has no qk_clip", "add one, or set None")
        problems.append(f"optim.qk_clip_tau = {tau}: the chain of {field} {has}; {rule}, or what is logged is wrong")
    if _nodes(state, optax.MultiStepsState):
        problems.append(f"{field}: {_MULTI_STEPS}")
    elif clips:
        outs = {path: out for path, (_, w), out in zip(paths, leaves, jaxpr.outvars, strict=True) if w.qk}
        if unclipped := list(not_clipped(jaxpr, outs)):
            problems.append(
                f"{field}: {'; '.join(unclipped)}; but every step's clips are logged: qk_clip must be the last of the "
                "chain, with setup.qk_parts, and outside of wrappers that leave out steps, such as "
                "optax.apply_if_finite (bad steps are skipped by guard.* anyway) and optax.conditionally_transform"
            )
    if problems:
        raise UserError(*problems)


def make_optimizer(config: Config, mesh: jax.sharding.Mesh) -> optax.GradientTransformation:
    """The optimizer of a config, with Newton-Schulz on whole matrices spread over `mesh`.

    Raises UserError for a function that is not there or fails, for parameters that it leaves without an update, if
    qk_clip_tau does not say what the chain does, if a qk_clip is not the last or not of every step, and for MultiSteps.
    """
    weights = declarations(config.model)
    if config.optim.optimizer != "muonclip":  # ours is checked by its tests
        _check(config, _build(config, weights, map_weights(lambda w: None, weights)), weights)
    return _build(config, weights, make_assignments(weights, mesh.shape))


def _owners(weights) -> Callable:
    """owner(path, leaf) -> (name, Weight) of the parameter whose path and shape a leaf of the state has, or None."""
    at = {path: w for path, w in jax.tree.leaves_with_path(weights, is_leaf=lambda x: isinstance(x, Weight))}

    def owner(path, leaf):
        alike = ((path[i:], at[path[i:]]) for i in range(len(path)) if path[i:] in at)
        own = next(((own, w) for own, w in alike if w.shape == leaf.shape), None)
        return own and (jax.tree_util.keystr(own[0], simple=True, separator="."), own[1])

    return owner


def state_specs(tx: optax.GradientTransformation, weights, sizes: Mapping[str, int]) -> optax.OptState:
    """PartitionSpecs of the optimizer's state: what lies at a parameter's path with its shape lies as the parameter.

    sizes: of the mesh's axes. All else (counters, factored moments) is on every device.
    """
    owner = _owners(weights)

    def spec(path, leaf):
        name = owner(path, leaf)
        return P() if name is None else name[1].spec(sizes)

    return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(tx.init, _shapes(weights)))


def muon_parameters(config: Config) -> set[str]:
    """Names of the parameters that the config's chain gives to scale_by_muon. Raises UserError if it fails."""
    weights = declarations(config.model)
    state = _abstract_state(config, _build(config, weights, map_weights(lambda w: None, weights)), weights)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for node in _nodes(state, MuonState)
        for path, _ in jax.tree.leaves_with_path(node.momentum)
    }


def optimizer_bytes(config: Config, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """({parameter: bytes of its optimizer state}, bytes of all else) on one device of a mesh with axes of these sizes.

    From the abstract state of whatever chain the config names. All else is on every device: counters, factored moments.
    Raises UserError for a function that is not there or fails.
    """
    weights = declarations(config.model)
    tx = _build(config, weights, map_weights(lambda w: None, weights))
    owner, by_parameter, rest = _owners(weights), Counter(), 0
    for path, leaf in jax.tree.leaves_with_path(_abstract_state(config, tx, weights)):
        size = leaf.size * leaf.dtype.itemsize
        if (found := owner(path, leaf)) is None:
            rest += size
            continue
        cuts = [
            axis for entry in found[1].spec(sizes) for axis in ((entry,) if isinstance(entry, str) else entry or ())
        ]
        by_parameter[found[0]] += size // math.prod(sizes[axis] for axis in cuts)
    return dict(by_parameter), rest


def init_optimizer(tx: optax.GradientTransformation, weights, params: optax.Params) -> optax.OptState:
    """tx.init(params), on a mesh laid out by `state_specs`."""
    if not on_mesh():
        return tx.init(params)
    specs = state_specs(tx, weights, jax.sharding.get_abstract_mesh().shape)
    return jax.sharding.auto_axes(tx.init, out_sharding=specs)(params)
