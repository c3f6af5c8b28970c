"""The optimizer update compiled alone, and what its HLO text says of communication."""

import re
from typing import NamedTuple

import jax
import optax

from k2jax.config import Config
from k2jax.model.transformer import declarations
from k2jax.optim import Plan, make_plans
from k2jax.optim.spread import chunks
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state

COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(?:-start)?\("
)
# what an instruction may run besides itself: a loop's body, a branch, a fusion, an asynchronous operation
CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    kind: str
    result: str  # its type: "f32[]", "(bf16[4,16], bf16[4,16])"
    repeated: bool  # whether it stands in a loop or a branch

    @property
    def is_scalar(self) -> bool:
        return all(dims == "" for dims in re.findall(r"\w+\[([\d,]*)\]", self.result))


def compile_update(config: Config, mesh: jax.sharding.Mesh, **options) -> jax.stages.Compiled:
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
        return run.lower(state.params, state.opt_state, state.params, logits).compile(compiler_options=options)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO module, by its name."""
    found, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _called(lines: list[str]) -> set[str]:
    several = [name.strip().lstrip("%") for line in lines for m in BRANCHES.findall(line) for name in m.split(",")]
    return {name for line in lines for name in CALLED.findall(line)} | set(several)


def collectives(text: str) -> list[Collective]:
    """All of an HLO module."""
    computations = _computations(text)
    todo = _called([x for lines in computations.values() for x in lines if " while(" in x or " conditional(" in x])
    repeated = set()
    while todo:
        name = todo.pop()
        repeated.add(name)
        todo |= _called(computations[name]) - repeated
    return [
        Collective(match[2], match[1], name in repeated)
        for name, lines in computations.items()
        for line in lines
        if (match := COLLECTIVE.search(line))
    ]


def expected_exchanges(config: Config, mesh: jax.sharding.Mesh) -> int:
    """One all-to-all in and one out for each chunk of each leaf that is cut: none is left for the iteration."""
    weights = declarations(config.model)
    leaves = jax.tree.leaves(weights, is_leaf=lambda x: hasattr(x, "group"))
    plans = jax.tree.leaves(make_plans(weights, mesh.shape), is_leaf=lambda x: isinstance(x, Plan))
    shapes = [w.shape[w.num_stack :] for w in leaves if w.group == "muon"]
    size = {"bfloat16": 2, "float32": 4}[config.optim.ns_dtype]
    return sum(
        2 * len(list(chunks(plan, shape, size))) for plan, shape in zip(plans, shapes, strict=True) if plan.group > 1
    )


def assert_only_exchanges(text: str, num_exchanges: int) -> None:
    """All-to-alls in and out, so many; scalars may be reduced (the global norm); nothing in a loop or a branch."""
    found = collectives(text)
    assert found, "no collective at all: was the update compiled for a mesh?"
    assert not [c for c in found if c.repeated]
    assert not [c for c in found if c.kind != "all-to-all" and not (c.kind == "all-reduce" and c.is_scalar)]
    assert sum(c.kind == "all-to-all" for c in found) == num_exchanges
