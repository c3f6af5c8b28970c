"""A compiled module's schedule played instruction by instruction: a model of its time, not a measurement.

The main core runs its instructions in their order, each for the longer of its matmuls and its bytes at the chip's
peaks. Collectives, copies to faster memory and SparseCore work beside it, from where they start to where the program
waits for them. Each mesh axis has links of its own. What this leaves out makes it optimistic: vector units, latencies,
SparseCore and links taking bandwidth from the core, imbalance between devices.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from k2jax.plan.chips import Network
from k2jax.plan.collectives import Collective, as_collective
from k2jax.plan.costs import Work
from k2jax.plan.hlo import Computation, Instruction, Module


class Rates(NamedTuple):
    """Shares of the peaks that are reached."""

    matmul: float = 1.0
    hbm: float = 1.0
    links: float = 1.0
    sparse_core: float = 1.0  # of `hbm`, while SparseCore reads and writes


class Transfer(NamedTuple):
    """A collective as it was played, once."""

    name: str  # of the instruction that starts it
    collective: Collective
    is_async: bool
    seconds: float  # on its links
    exposed: float  # that the core waits for it
    compute: float  # seconds of the core's work between its start and its end


@dataclass
class Played:
    """One run of a computation, with all that it calls."""

    seconds: float = 0.0
    core_seconds: float = 0.0  # without waiting
    exposed: float = 0.0  # waiting for collectives
    exposed_other: float = 0.0  # waiting for copies and SparseCore
    work: Work = Work()
    transfers: Counter = field(default_factory=Counter)  # {(computation, Transfer): runs}

    def add(self, other: "Played", times: float = 1.0) -> None:
        for name in ("seconds", "core_seconds", "exposed", "exposed_other"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.add_work(other.work, times)
        for transfer, runs in other.transfers.items():
            self.transfers[transfer] += runs * times

    def add_work(self, work: Work, times: float = 1.0) -> None:
        self.work = Work(*(a + times * b for a, b in zip(self.work, work, strict=True)))


class _Running(NamedTuple):
    """Something that was started and not yet waited for."""

    end: float  # on the clock; of a copy: on the memory's
    core_seconds: float  # when it started
    collective: Collective | None
    seconds: float
    is_copy: bool


class Schedule:
    """The inputs of a play: a module, the work of its instructions, the network, the turns of its loops."""

    def __init__(
        self,
        module: Module,
        work: Callable[[Computation, Instruction], Work],
        network: Network,
        turns: Callable[[Computation, Instruction], float],
        rates: Rates = Rates(),
    ):
        self.module, self.work, self.network, self.turns, self.rates = module, work, network, turns, rates
        self._played: dict[str, Played] = {}

    def play(self, name: str | None = None) -> Played:
        """Of the computation `name`, the entry unless given."""
        name = name or self.module.entry
        if name not in self._played:
            self._played[name] = _Player(self, self.module.computations[name]).run()
        return self._played[name]

    def collective_of(self, computation: Computation, one: Instruction) -> Collective | None:
        """The collective that `one` is or runs: alone, fused, or wrapped to be asynchronous."""
        found = as_collective(computation, one, self.network.sizes)
        if found is None and (one.opcode == "fusion" or one.opcode.endswith("-start")):
            inside = (as_collective(c, inner, self.network.sizes) for c, inner in self.module.inside(one))
            found = next((inner for inner in inside if inner is not None), None)
        return found and found._replace(op_name=one.op_name or found.op_name)

    def seconds(self, work: Work) -> tuple[float, float]:
        """(of matmuls, of memory)"""
        chip, rates = self.network.chip, self.rates
        return work.flops / (chip.flops * rates.matmul), work.hbm_bytes / (chip.hbm * rates.hbm)


class _Player:
    """The clocks of one run of a computation; nothing is under way when it begins."""

    def __init__(self, schedule: Schedule, computation: Computation):
        self.schedule, self.computation, self.total = schedule, computation, Played()
        self.free: dict[str, float] = {}  # when each axis's links, and SparseCore, have done what they were given
        self.running: dict[str, _Running] = {}
        # Copies take what memory bandwidth the core leaves: seconds of it asked for, and got so far.
        self.asked = self.got = 0.0

    def run(self) -> Played:
        for one in self.computation.instructions:
            self._step(one)
        for name in list(self.running):
            self._finish(name)
        return self.total

    def _pass(self, seconds: float, memory_seconds: float = 0.0) -> None:
        self.total.seconds += seconds
        self.got = min(self.asked, self.got + max(0.0, seconds - memory_seconds))

    def _step(self, one: Instruction) -> None:
        if one.opcode in ("while", "conditional", "call"):
            self._call(one)
        elif one.opcode.endswith("-done"):
            self._finish(one.operands[0])
        elif one.opcode.endswith("-update"):
            self._update(one)
        elif one.opcode.endswith("-start") and not one.operands:
            pass  # SparseCore's: it is given its inputs, and begins, by its update
        elif (collective := self.schedule.collective_of(self.computation, one)) is not None:
            self._communicate(one, collective)
        elif one.opcode.endswith("-start"):
            self._start(one)
        else:
            self._compute(self.schedule.work(self.computation, one))

    def _update(self, one: Instruction) -> None:
        """Begin what was started without inputs, or go on under another name."""
        start = self.computation.by_name[one.operands[0]]
        if start.operands:
            if start.name in self.running:
                self.running[one.name] = self.running.pop(start.name)
            return
        collective = self.schedule.collective_of(self.computation, start)
        if collective is not None:
            self._communicate(start, collective)
        else:
            self._start(start)
        self.running[one.name] = self.running.pop(start.name)

    def _call(self, one: Instruction) -> None:
        callees = [callee for callee in self.schedule.module.callees(one)]
        if one.opcode == "while":
            callees = [self.schedule.module.computations[one.attribute("body")]]
        played = max((self.schedule.play(callee.name) for callee in callees), key=lambda p: p.seconds)
        times = self.schedule.turns(self.computation, one) if one.opcode == "while" else 1
        before = self.total.seconds
        self.total.add(played, times)
        self.total.seconds = before
        self._pass(times * played.seconds, times * self.schedule.seconds(played.work)[1])

    def _compute(self, work: Work) -> None:
        matmul, memory = self.schedule.seconds(work)
        self.total.add_work(work)
        self.total.core_seconds += max(matmul, memory)
        self._pass(max(matmul, memory), memory)

    def _occupy(self, resources: tuple[str, ...], seconds: float) -> float:
        """The time at which resources that begin now, or as soon as all are free, have done it."""
        end = max([self.total.seconds, *(self.free.get(name, 0.0) for name in resources)]) + seconds
        self.free.update(dict.fromkeys(resources, end))
        return end

    def _communicate(self, one: Instruction, collective: Collective) -> None:
        network, rates = self.schedule.network, self.schedule.rates
        seconds = network.seconds(collective.kind, collective.axes, collective.array_bytes) / rates.links
        is_async = one.opcode.endswith("-start") and '"is_sync":true' not in one.attributes
        end = self._occupy(collective.axes, seconds)
        self.running[one.name] = _Running(end, self.total.core_seconds, collective, seconds, False)
        if one.opcode == "fusion":  # matmuls fused with a collective run beside it
            self._compute(Work(self.schedule.work(self.computation, one).flops, 0.0))
        if not is_async:
            self._finish(one.name, is_async=False)

    def _start(self, one: Instruction) -> None:
        work = self.schedule.work(self.computation, one)
        self.total.add_work(work)
        memory = self.schedule.seconds(work)[1]
        if self.schedule.module.callees(one):
            seconds = memory / self.schedule.rates.sparse_core
            end = self._occupy(("SparseCore",), seconds)
            self.running[one.name] = _Running(end, self.total.core_seconds, None, seconds, False)
        else:
            self.asked += memory
            self.running[one.name] = _Running(self.asked, self.total.core_seconds, None, memory, True)

    def _finish(self, name: str, is_async: bool = True) -> None:
        """Wait for what `name` started, once; the end of what was started elsewhere is no wait."""
        started = self.running.pop(name, None)
        if started is None:
            return
        clock = self.got if started.is_copy else self.total.seconds
        waited = max(0.0, started.end - clock)
        self._pass(waited)
        if started.collective is None:
            self.total.exposed_other += waited
            return
        self.total.exposed += waited
        compute = self.total.core_seconds - started.core_seconds
        transfer = Transfer(name, started.collective, is_async, started.seconds, waited, compute)
        self.total.transfers[self.computation.name, transfer] += 1
