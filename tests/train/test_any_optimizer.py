"""Every optimizer of optax and optax.contrib trains the model on a mesh as it does on one device."""

import functools
import inspect
import math

import jax
import numpy as np
import optax
import pytest
from test_step import make_config, make_values

from k2jax.config import MeshConfig, ModelConfig
from k2jax.model.transformer import declarations
from k2jax.model.weights import Weight
from k2jax.optim.setup import map_weights
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.optimizer import init_optimizer
from k2jax.train.phases import phase_rope
from k2jax.train.step import accumulate, make_loss, make_update

pytestmark = pytest.mark.slow
CONFIG = make_config(
    ModelConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=32, moe_intermediate_size=16,
        n_routed_experts=4, num_experts_per_tok=2,
    ),
    1,
)  # fmt: skip
WEIGHTS = declarations(CONFIG.model)
MESHES = ((), (("fsdp", 2), ("expert", 2), ("tensor", 2)))
# Where 1e-2 is no rate that five steps of this model show something with.
RATES = {
    "acprop": 3e-3, "adadelta": 3.0, "adagrad": 0.1, "ademamix": 1e-3, "cocob": 1.0, "dadapt_adamw": 1.0, "dog": 1.0,
    "dowg": 1.0, "lars": 3.0, "momo": 1.0, "noisy_sgd": 0.1, "optimistic_gradient_descent": 0.1, "polyak_sgd": 1.0,
    "prodigy": 1.0, "sgd": 0.3,
}  # fmt: skip
ARGUMENTS = {
    "acprop": {"eps": 1e-3},  # 1e-16 makes updates of the rounding of gradients that are zero
    "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0},
    "noisy_sgd": {"key": 0},
}
# Around an optimizer, or after one.
WRAPPED = {
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
    "contrib.reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "contrib.sam": lambda: optax.contrib.sam(optax.sgd(0.3), optax.sgd(0.01)),
    "contrib.schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.3), 0.3),
}
# What does not take plain gradients, and says so itself.
EXCEPTIONS = {
    "contrib.dpsgd": (ValueError, "expects `grads` to have a batch dimension"),  # of every example apart
    "contrib.sophia": (ValueError, "obj_fn must be provided"),  # a second derivative
    "lbfgs": (TypeError, "missing 1 required keyword-only argument: 'value_fn'"),  # the loss again, on its line search
    "optimistic_adam": (DeprecationWarning, "use `optimistic_adam_v2`"),
}
# One of each kind of state in every suite: like the parameters, factored, none at all; the others by `make test-grid`.
QUICK = ("adamw", "adafactor", "sgd")


def optimizers(module) -> dict:
    """{name: function} of a module's functions that take a learning rate and are no parts of a chain."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if not name.startswith(("_", "scale_by_")) and "learning_rate" in inspect.signature(function).parameters
    }


def build(function, name):
    """An optimizer of its module, with its rate."""
    name = name.removeprefix("contrib.")
    return function(**ARGUMENTS.get(name, {}), learning_rate=RATES.get(name, 1e-2))


NAMED = optimizers(optax) | {f"contrib.{name}": f for name, f in optimizers(optax.contrib).items()}
ALL = {name: functools.partial(build, f, name) for name, f in NAMED.items()} | WRAPPED


@functools.cache
def gradients(axes):
    """(mesh, weights on it, compiled losses and gradients of one fixed batch)."""
    params, bias, batch = make_values(CONFIG)
    mesh = make_mesh(MeshConfig(**dict(axes)), jax.devices()[: math.prod(dict(axes).values())])
    loss_fn = functools.partial(make_loss(CONFIG), rope=phase_rope(CONFIG, 0))

    def place(x, at):
        return jax.device_put(x, jax.NamedSharding(mesh, at))

    params = jax.tree.map(
        lambda w, x: place(x, w.spec(mesh.shape)), WEIGHTS, params, is_leaf=lambda x: isinstance(x, Weight)
    )
    batch = Batch(*(place(x, spec("MBT")) for x in batch))
    bias = jax.tree.map(lambda x: place(x, jax.P()), bias)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda params: accumulate(loss_fn, 0.0, params, bias, batch)).lower(params).compile()
    return mesh, params, compiled


def losses(tx, axes) -> list[float]:
    """Of five steps on the same batch, and after them."""
    mesh, params, grads_of = gradients(axes)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: init_optimizer(tx, WEIGHTS, p))(params)
        update = make_update(tx, map_weights(lambda w: w.group, WEIGHTS))
        found, grads = grads_of(params)
        update = jax.jit(update).lower(True, found, grads, state, params).compile()
        seen = []
        for _ in range(5):
            found, grads = grads_of(params)
            seen.append(float(found.loss))
            (params, state), _ = update(np.bool_(True), found, grads, state, params)
        return [*seen, float(grads_of(params)[0].loss)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.grid) for n in sorted(set(ALL) - set(EXCEPTIONS))],
)
def test_trains_on_eight_devices_as_on_one(name):
    one, eight = (losses(ALL[name](), axes) for axes in MESHES)
    assert all(map(math.isfinite, eight)) and eight[-1] < eight[0]
    np.testing.assert_allclose(eight, one, rtol=1e-4)


@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # dpsgd gives it to its own part
@pytest.mark.parametrize("name", sorted(EXCEPTIONS))
def test_the_rest_say_why_not(name):
    error, message = EXCEPTIONS[name]
    with pytest.raises(error, match=message):
        losses(ALL[name](), MESHES[1])


def test_none_is_forgotten():
    assert len(EXCEPTIONS) <= 6
    assert {"adamw", "adafactor", "lion", "sm3", "contrib.muon", "contrib.prodigy"} < set(ALL) and len(ALL) > 45
