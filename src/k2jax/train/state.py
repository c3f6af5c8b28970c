"""All that influences the future of a run, in one pytree."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from k2jax.config import Config
from k2jax.model.transformer import bias_declarations, declarations, init_router_bias
from k2jax.model.weights import Weight, init_params
from k2jax.train.guard import Guard, init_guard
from k2jax.train.optimizer import init_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32, steps done so far, bad ones too, so also the next step's number and data position."""

    step: jax.Array
    params: dict
    router_bias: dict
    opt_state: optax.OptState
    guard: Guard


def init_state(config: Config, tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0, a function of `config.train.seed`; sharded as declared where a mesh is set."""

    def init():
        weights = declarations(config.model)
        params = init_params(weights, jax.random.key(config.train.seed), config.model.initializer_range)
        opt_state = init_optimizer(tx, weights, params)
        bias, guard = init_router_bias(config.model), init_guard(config.guard)
        return TrainState(jnp.zeros((), jnp.int32), params, bias, opt_state, guard)

    return jax.jit(init)()


def abstract_model(config: Config, mesh: jax.sharding.Mesh | None) -> tuple[dict, dict]:
    """Shapes, dtypes and layouts at rest of (params, router_bias) on `mesh`; None: on this process's first device."""

    def shape(weight: Weight):
        if mesh is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        else:
            # A bias is whole on every device, as `init_router_bias` makes it.
            sharding = jax.NamedSharding(mesh, weight.spec(mesh.shape) if weight.group else jax.P())
        return jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=sharding)

    declared = declarations(config.model), bias_declarations(config.model)
    return jax.tree.map(shape, declared, is_leaf=lambda x: isinstance(x, Weight))


def abstract_state(config: Config, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`, without making it."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(lambda: init_state(config, tx))

    def concrete(x):
        spec = x.sharding.spec if x.sharding else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(concrete, shapes)
