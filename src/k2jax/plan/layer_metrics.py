"""Figures of one MoE layer and microbatch in a compiled program, forward and backward, by which programs are compared.

They come from the loops over layers, so a whole step and the layers alone have the same.
"""

import dataclasses

from k2jax.config import Config
from k2jax.model.attention import chunk_tokens
from k2jax.model.flops import flops_per_token
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.plan.collectives import Collective
from k2jax.plan.hlo import Array, arrays
from k2jax.plan.kernel_costs import is_ragged_dot, ragged_dot_work
from k2jax.plan.program import Program
from k2jax.plan.schedule import Played, Schedule, Transfer

LARGE = 64 * 2**20  # bytes of a collective that is worth hiding
EXCHANGES = ("ragged-all-to-all", "all-to-all")


def moe_flops_per_token(config: Config) -> float:
    """Of one MoE layer, forward and backward: its share of `flops_per_token`."""
    model = config.model
    num_moe = model.num_hidden_layers - model.first_k_dense_replace
    alone = dataclasses.replace(model, num_hidden_layers=num_moe, first_k_dense_replace=0)
    weights = weight_leaves(declarations(model)["moe"])
    return flops_per_token(weights, alone, config.data.sequence_length) / num_moe


def is_exchange(collective: Collective) -> bool:
    return collective.kind in EXCHANGES and "expert" in collective.axes


class LayerMetrics:
    """The loops over MoE layers of a program, each instruction with its runs per layer and microbatch."""

    def __init__(self, program: Program):
        """Raises ValueError for a program without such a loop: XLA unrolls a scan of one layer."""
        if not program.layer_bodies:
            raise ValueError("the program has no loop over MoE layers")
        self.program = program
        # The loops of the forward and the backward pass run equally often.
        self.layers = max(program.layer_bodies.values())
        self.schedule = program.schedule()
        self.instructions = [
            (computation, one, runs / self.layers)
            for computation, runs, in_layers in program.executions
            if in_layers
            for one in computation.instructions
        ]
        self.rows = self._rows()

    def played(self, schedule: Schedule | None = None) -> Played:
        """One layer and microbatch, at the peaks unless another schedule of the program is given."""
        total = Played()
        for body, runs in self.program.layer_bodies.items():
            total.add((schedule or self.schedule).play(body), runs / self.layers)
        return total

    def transfers(self) -> list[tuple[Transfer, float]]:
        return [(transfer, runs) for (_, transfer), runs in self.played().transfers.items()]

    def _rows(self) -> set[int]:
        """Numbers of rows exchanged at once, and worked on by experts: leading dims of what they are given."""
        found = set()
        for computation, one, _ in self.instructions:
            if one.opcode == "custom-call" and is_ragged_dot(one):
                found.add(computation.by_name[one.operands[-2]].arrays[0].dims[0])
        for transfer, _ in self.transfers():
            if is_exchange(transfer.collective) and transfer.collective.array_bytes > LARGE:
                found |= {arrays(kind)[0].dims[0] for kind in transfer.collective.taken[:2]}  # sent, and received into
        return found

    def _is_whole_rows(self, array: Array) -> bool:
        """[R, D], [R, 2, D / 2] as the exchange tiles it, or the experts' own [R, F]; not a number per row."""
        model, dims = self.program.config.model, array.dims
        width = min(model.hidden_size, model.moe_intermediate_size)
        heads = {dims[0], dims[0] * dims[1]} if len(dims) > 1 else set()
        return any(array.size >= rows * width for rows in heads & self.rows)

    def row_bytes(self) -> float:
        """HBM bytes of what the core does to whole rows beside matmuls: fills, masks, relayouts, activations."""
        return sum(
            runs * self.program.work(computation, one).hbm_bytes
            for computation, one, runs in self.instructions
            if any(map(self._is_whole_rows, one.arrays))
            and self.schedule.collective_of(computation, one) is None
            and not one.opcode.endswith("-start")
            and one.opcode != "custom-call"
        )

    def ragged_dot_over_useful(self) -> float | None:
        """Time of `lax.ragged_dot` at the peaks over that of its useful FLOPs; None without one."""
        chip, taken, useful = self.program.network.chip, 0.0, 0.0
        for computation, one, runs in self.instructions:
            if one.opcode == "custom-call" and is_ragged_dot(one):
                work, flops = ragged_dot_work(computation, one, self.program.filled)
                taken += runs * max(self.schedule.seconds(work))
                useful += runs * flops / chip.flops
        return taken / useful if useful else None

    def quadratic_bytes(self) -> int:
        """Of the largest array of attention's logits in the device's memory, a chunk of queries by one of keys."""
        config = self.program.config
        length = config.data.sequence_length
        chunk = min(chunk_tokens(length, config.kernels), length)
        heads = config.model.num_attention_heads // self.program.sizes["tensor"]

        def is_quadratic(array: Array) -> bool:
            is_large = array.space == 0 and array.size >= heads * chunk**2
            return is_large and sum(dim in (chunk, length) for dim in array.dims) >= 2

        found = [
            array.num_bytes
            for _, one, _ in self.instructions
            if "attention" in one.op_name
            for array in one.arrays
            if is_quadratic(array)
        ]
        return max(found, default=0)

    def crossings(self) -> float:
        """Rows over the exchange, in units of all choices of a device's tokens, each a whole row, once."""
        program, model = self.program, self.program.config.model
        once = program.tokens * model.num_experts_per_tok * model.hidden_size * program.itemsize
        moved = sum(r * t.collective.array_bytes for t, r in self.transfers() if is_exchange(t.collective))
        return moved / once

    def synchronous(self) -> int:
        """Collectives of more than LARGE bytes, in a layer and microbatch, that nothing can hide."""
        return round(sum(r for t, r in self.transfers() if not t.is_async and t.collective.array_bytes > LARGE))

    def describe(self) -> dict:
        """JSON values, of one layer and microbatch on one device: seconds, ratios, bytes."""
        played, tokens = self.played(), self.program.tokens
        return {
            "runs": self.layers,
            "seconds": played.seconds,
            "exposed_seconds": played.exposed,
            "waiting_for_memory_seconds": played.exposed_other,
            "communication_seconds": sum(runs * transfer.seconds for transfer, runs in self.transfers()),
            "flops": played.work.flops,
            "flops_over_model": played.work.flops / (moe_flops_per_token(self.program.config) * tokens),
            "hbm_bytes": played.work.hbm_bytes,
            "hbm_bytes_per_token": played.work.hbm_bytes / tokens,
            "crossings": self.crossings(),
            "synchronous_collectives": self.synchronous(),
            "ragged_dot_over_useful": self.ragged_dot_over_useful(),
            "quadratic_attention_bytes": self.quadratic_bytes(),
            "row_bytes": self.row_bytes(),
        }
