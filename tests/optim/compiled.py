"""The optimizer update compiled alone, and what its HLO text says of communication."""

import jax
import optax

from k2jax.config import Config
from k2jax.plan.aot import beyond_exchanges
from k2jax.plan.collectives import collectives
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state


def compile_update(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The whole chain and apply_updates, of a run's state laid out as at rest, and donated."""
    with jax.set_mesh(mesh):
        tx = make_optimizer(config, mesh)
        state = abstract_state(config, tx, mesh)
        model = config.model
        logits = jax.ShapeDtypeStruct(
            (model.num_hidden_layers, model.num_attention_heads),
            "float32",
            sharding=jax.NamedSharding(mesh, jax.P()),
        )

        def update(params, opt_state, grads, max_logits):
            updates, opt_state = tx.update(grads, opt_state, params, max_logits=max_logits)
            return optax.apply_updates(params, updates), opt_state

        specs = jax.tree.map(lambda x: x.sharding.spec, (state.params, state.opt_state))
        run = jax.jit(jax.sharding.auto_axes(update, out_sharding=specs), donate_argnums=(0, 1))
        return run.lower(state.params, state.opt_state, state.params, logits).compile()


def assert_only_exchanges(text: str, mesh: jax.sharding.Mesh, num_exchanges: int) -> None:
    """All-to-alls in and out, so many; scalars may be reduced (the global norm); nothing in a loop or a branch."""
    found = collectives(text, mesh.shape)
    assert found, "no collective at all: was the update compiled for a mesh?"
    assert not beyond_exchanges(found, num_exchanges)
