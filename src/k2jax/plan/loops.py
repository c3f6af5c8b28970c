"""Trip counts of a module's loops, of those too that data decides; and the loops over MoE layers."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from k2jax.plan.hlo import Computation, Instruction, Module, most_turns, turns

# jit(train_step)/while/body/eval_jaxpr/transpose(jvp(layers))/while: a scan over layers (model/transformer.py)
LAYERS = re.compile(r"\blayers\)*/while$")
EXPERTS = "/experts/"  # a scope of what only MoE layers have


class Assumption(NamedTuple):
    """A trip count that the program does not fix."""

    op_name: str
    turns: float
    reason: str


class Loops:
    """Trip counts of a module's loops, and the assumptions that they rest on."""

    def __init__(self, module: Module):
        self.module = module
        self.assumptions: dict[str, Assumption] = {}  # by the name of the body
        self._around = {
            one.attribute("body"): (computation, one)
            for computation in module.computations.values()
            for one in computation.instructions
            if one.opcode == "while"
        }

    def turns(self, computation: Computation, loop: Instruction) -> float:
        """Of a `while` that stands in `computation`."""
        known = turns(self.module, computation, loop)
        if known is not None:
            return known
        body = loop.attribute("body")
        if body not in self.assumptions:
            self.assumptions[body] = Assumption(loop.op_name, *self._assumed(computation, loop))
        return self.assumptions[body].turns

    def _assumed(self, computation: Computation, loop: Instruction) -> tuple[float, str]:
        if (most := most_turns(self.module, computation, loop)) is not None:
            return most, "as on the devices that turn it at all"
        around = self._around.get(computation.name)
        outer = around and turns(self.module, *around)
        if outer is not None:
            return (outer + 1) / 2, f"the mean of 1 to {outer}: causal attention of whole sequences"
        return 1, "unknown: as if it turned once"

    def executions(self) -> Iterator[tuple[Computation, float, bool]]:
        """(computation, runs in one run of the module, whether in the loop over MoE layers) of all but fusions.

        Branches count as taken. One that is called from several places comes once for each.
        """
        todo = [(self.module.computations[self.module.entry], 1.0, False)]
        while todo:
            computation, runs, in_layers = todo.pop()
            yield computation, runs, in_layers
            for one in computation.instructions:
                if one.opcode == "while":
                    body = self.module.computations[one.attribute("body")]
                    inside = in_layers or self.is_over_moe_layers(one)
                    todo.append((body, runs * self.turns(computation, one), inside))
                elif one.opcode in ("conditional", "call"):
                    todo += [(callee, runs, in_layers) for callee in self.module.callees(one)]

    def is_over_moe_layers(self, loop: Instruction) -> bool:
        if not LAYERS.search(loop.op_name):
            return False
        body = self.module.computations[loop.attribute("body")]
        return any(EXPERTS in one.op_name for one in body.instructions)
