"""The training loop: build or restore; save if due, draw the batch, step, write the previous step's metrics."""

import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax

from k2jax.config import Config
from k2jax.data.loader.batches import data_position, train_batches
from k2jax.data.loader.corpus import open_data
from k2jax.data.loader.rows import RowReader
from k2jax.data.loader.segments import describe_mixture, plan_run, read_plan, write_plan
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.files import write_atomic
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.preflight.availability import check_kernels
from k2jax.preflight.self_check import is_on, self_check
from k2jax.runs.commits import newest_step
from k2jax.runs.folder import lock_run
from k2jax.sharding.mesh import make_mesh
from k2jax.train.banner import banner, versions
from k2jax.train.batch import split_rows
from k2jax.train.checkpoint import Saver
from k2jax.train.compile_cache import cache_notes, compile_cache
from k2jax.train.display import Display
from k2jax.train.ledger import Ledger
from k2jax.train.optimizer import make_optimizer
from k2jax.train.recorder import Recorder
from k2jax.train.start import check_resume, check_run_dir, check_source, make_run_dir, start_state
from k2jax.train.state import TrainState, abstract_state
from k2jax.train.step import make_train_step
from k2jax.train.validate import bits_per_byte, make_evaluator


class StopRequest:
    """Set by the first SIGINT or SIGTERM, which lets the step end; the second one acts as if we had not been here."""

    def __init__(self):
        self.signal: int | None = None
        self._old = {s: signal.signal(s, self._set) for s in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number, frame):
        self.signal = number
        self.restore()
        print("stopping after this step; the same signal again stops at once", flush=True)

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Result:
    """How a run ended. signal: the one that stopped it, or None where all steps are done."""

    step: int
    signal: int | None
    validation_bits_per_byte: float | None


def describe_run(config: Config, tx, mesh: jax.sharding.Mesh) -> str:
    """The start banner."""
    weights, groups = declarations(config.model), Counter()
    for weight in weight_leaves(weights):
        groups[weight.group] += weight.size
    return banner(config, weights, abstract_state(config, tx, mesh), mesh, groups)


def run(config: Config, change_mixture: bool = False) -> Result:
    """Train `config` to its last step, from wherever its run directory stands.

    change_mixture: the sources, their weights and epochs may be others than those the run had until now.
    Raises UserError for what a user can mend before the first step, RunFailed where the run itself went wrong.
    """
    config.validate()
    mesh = make_mesh(config.mesh)
    check_kernels(config, mesh)
    check_run_dir(config)  # before anything is written, and again below when nobody else can write
    corpus, folder = open_data(config), Path(config.train.run_dir)
    plan_run(corpus, config, read_plan(folder), newest_step(folder / "checkpoints") or 0, change_mixture)
    check_source(config, corpus)
    tx = make_optimizer(config, mesh)
    make_run_dir(folder)
    with lock_run(folder), jax.set_mesh(mesh):
        step, timeline, notes = check_resume(config, corpus, change_mixture)
        write_atomic(folder / "config.json", config.to_json())  # first: a folder without it is no run
        write_plan(folder, timeline.plan)
        if (tokenizer := corpus.tokenizer()) is not None:
            save_tokenizer(tokenizer, folder / "tokenizer")
        write_atomic(folder / "env.txt", "".join(f"{name} {version}\n" for name, version in versions().items()))
        saver = Saver(folder / "checkpoints", config.checkpoint)
        display = Display(step or 0, config.train.num_steps, config.train.log_every)
        display.say("\n".join([describe_run(config, tx, mesh), describe_mixture(timeline, config), *notes]))
        if is_on(config):
            display.say(self_check(config, mesh))
        stop = StopRequest()
        try:
            with compile_cache(config.train):
                state = start_state(config, tx, step, timeline, mesh, saver, display)
                return train(config, tx, corpus, timeline, mesh, state, saver, display, stop)
        finally:
            stop.restore()
            display.close()
            saver.join()  # a failure elsewhere loses no save that had begun


def train(
    config, tx, corpus, timeline, mesh, state: TrainState, saver: Saver, display: Display, stop: StopRequest
) -> Result:
    """The loop itself, from `state` to the last step or the first signal."""
    num_steps, num_microbatches = config.train.num_steps, config.train.num_microbatches
    step = first = int(jax.device_get(state.step))
    recorder, evaluate = Recorder(config, first, display), make_evaluator(config, corpus, mesh)
    ledger = Ledger(Path(config.train.run_dir) / "ledger.jsonl", RowReader(corpus, timeline, config), config, first)
    batches, validation = train_batches(corpus, timeline, config, first), None

    def save():
        recorder.sync()  # a committed step's past is on the disk
        with recorder.untimed():
            saver.save(step, state, config, data_position(timeline, config, step))

    def draw():
        """The rows of step `step`, the replaced ones entered in the ledger."""
        rows = next(batches)
        if "replaced" in rows:
            ledger.enter(step, rows["replaced"])
        return split_rows(rows, num_microbatches, mesh)

    if step < num_steps and stop.signal is None:
        batch = draw()
        with display.phase("compile") as said:
            with cache_notes() as notes:
                # The only one of a run: a `Compiled` takes arrays of these shapes and layouts or raises.
                compiled = jax.jit(make_train_step(config, tx), donate_argnums=0).lower(state, batch).compile()
            said += notes
        recorder.start_clock()
    with jax.transfer_guard("disallow"):
        while step < num_steps and stop.signal is None:
            if step > first:
                if step % config.checkpoint.save_every == 0:
                    save()
                # Nothing may come between a save and the next batch: the data position is the step alone.
                batch = draw()
            state, metrics = compiled(state, batch)
            recorder.write()
            step += 1
            extra = {}
            if step == num_steps or (config.train.eval_every and step % config.train.eval_every == 0):
                jax.block_until_ready(metrics)
                with recorder.untimed():
                    validation = bits_per_byte(evaluate(state), corpus)
                extra = {"validation_bits_per_byte": validation}
            recorder.hold(step - 1, metrics, extra)
            saver.poll()
        if step > first:
            save()
        saver.wait()
    recorder.close()
    return Result(step, stop.signal if step < num_steps else None, validation)
