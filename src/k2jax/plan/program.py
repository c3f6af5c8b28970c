"""A compiled program with what it takes to play it: the work of its instructions, turns of its loops, the network."""

import math
from collections import Counter
from functools import cached_property

import jax.numpy as jnp

from k2jax.config import Config
from k2jax.plan.chips import Network
from k2jax.plan.costs import Costs, Work
from k2jax.plan.hlo import Computation, Instruction, parse
from k2jax.plan.kernel_costs import is_unknown, kernel_work
from k2jax.plan.loops import Loops
from k2jax.plan.schedule import Played, Rates, Schedule
from k2jax.sharding.exchange import buffer_rows


class Program:
    """A scheduled module of `config` for a mesh: a whole step, or its layers alone (layer_program.py).

    Rows of the exchange are taken as balanced, sequences as one document each.
    """

    def __init__(self, text: str, config: Config, network: Network):
        self.config, self.network, self.sizes = config, network, network.sizes
        self.module = parse(text)
        self.loops, self.costs = Loops(self.module), Costs(self.module)
        of_stage = math.prod(self.sizes.values()) // self.sizes["stage"]
        self.tokens = config.batch_tokens // config.train.num_microbatches // of_stage
        self.itemsize = jnp.dtype(config.train.compute_dtype).itemsize
        self.filled = self._filled()

    def _filled(self) -> float:
        """The share of the rows of an expert's buffer that are there at the balanced load."""
        model, num_shards = self.config.model, self.sizes["expert"]
        choices, tokens = model.num_experts_per_tok, self.tokens * self.sizes["tensor"]
        if num_shards == 1:
            return 1.0
        buffer = self.config.kernels.expert_buffer
        return tokens * choices / buffer_rows(tokens, choices, model.n_routed_experts, num_shards, buffer)

    def work(self, computation: Computation, one: Instruction) -> Work:
        kernel = kernel_work(self.costs, computation, one, self.filled)
        return self.costs.work(computation, one) if kernel is None else kernel

    def schedule(self, rates: Rates = Rates()) -> Schedule:
        return Schedule(self.module, self.work, self.network, self.loops.turns, rates)

    def play(self, rates: Rates = Rates()) -> Played:
        return self.schedule(rates).play()

    @cached_property
    def executions(self) -> list[tuple[Computation, float, bool]]:
        return list(self.loops.executions())

    @cached_property
    def layer_bodies(self) -> dict[str, float]:
        """{body of a loop over MoE layers: its runs in one run of the program}"""
        found = Counter()
        for computation, runs, in_layers in self.executions:
            for one in computation.instructions:
                if one.opcode == "while" and not in_layers and self.loops.is_over_moe_layers(one):
                    found[one.attribute("body")] += runs * self.loops.turns(computation, one)
        return dict(found)

    @property
    def unknown_kernels(self) -> list[str]:
        """Names of Mosaic calls whose FLOPs nothing tells, so that they count as none."""
        return sorted({one.name for c, _, _ in self.executions for one in c.instructions if is_unknown(one)})
