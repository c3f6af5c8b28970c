"""The training loop: build or restore; save if due, draw the batch, step, write the previous step's metrics."""

import contextlib
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NoReturn

import jax

from k2jax.config import Config
from k2jax.data.loader.batches import data_position, train_batches
from k2jax.data.loader.rows import RowReader
from k2jax.errors import RunFailed, UserError
from k2jax.preflight.self_check import is_on, self_check
from k2jax.processes import count, fail, index, is_joined, say
from k2jax.sharding.compile_options import refusing_options
from k2jax.train.batch import BatchLayout
from k2jax.train.compile_cache import compile_cache
from k2jax.train.checkpoint import parts
from k2jax.train.compile_step import CompiledStep, begin_compile
from k2jax.train.compiling import all_have_compiled
from k2jax.train.copies import check_copies
from k2jax.train.ledger import Ledger
from k2jax.train.matmul_rate import matmul_seconds
from k2jax.train.outputs import Outputs
from k2jax.train.pace import Pace
from k2jax.train.recorder import Recorder
from k2jax.train.start import Run, open_run, start_state
from k2jax.train.state import TrainState
from k2jax.train.stop import StopRequest
from k2jax.train.validate import bits_per_byte, make_evaluator


@dataclass(frozen=True)
class Result:
    """The end of a run. signal: the one that stopped it, or None if all steps are done."""

    step: int
    signal: int | None
    validation_bits_per_byte: float | None


def fail_with_others(run: Run, error: Exception) -> NoReturn:
    """End this process of many, and so all: at once, or if nothing is broken after a save that had begun.

    All may fail alike, or this one alone, over a row of its own while the others wait for it in a step; their part of
    the save goes on in its thread. Anything that is not ours to raise may be the end of another, who saves no more.
    """
    if isinstance(error, (UserError, RunFailed)) and run.saver.is_saving():
        seconds = run.config.checkpoint.save_timeout_seconds
        say(f"process {index()}: {error}; a save is under way, and is waited for, {seconds} s at most")
        run.saver.join(seconds)
    with contextlib.suppress(Exception):  # the disk that is full may be why this process fails
        run.outputs.close()
    fail(error)


def run(config: Config, change_mixture: bool = False) -> Result:
    """Train `config` to its last step, from wherever its run directory stands.

    change_mixture: the sources, their weights and epochs may differ from those of the run until now.
    Raises UserError for what a user can correct before the first step, RunFailed if the run itself went wrong.
    """
    early = StopRequest() if is_joined() else None  # of many, one that a signal just killed would be missed for long
    with open_run(config, change_mixture) as opened:
        stop = early or StopRequest()
        stop.begin(opened.outputs)
        try:
            if is_on(config):
                opened.outputs.say(self_check(config, opened.mesh))
            with compile_cache(config.train), refusing_options():
                # From shapes alone, beside the state: either may take minutes, and each leaves most of the host idle.
                steps_left = opened.resumed_step is None or opened.resumed_step < config.train.num_steps
                compiling = begin_compile(config, opened.tx, opened.abstract, opened.mesh) if steps_left else None
                return train(opened, start_state(opened), compiling, stop)
        except Exception as error:
            if count() > 1:  # what is below would wait for the others, who wait for this one
                fail_with_others(opened, error)
            raise
        finally:
            stop.restore()


def _wait_for(compiling: Future[CompiledStep], outputs: Outputs) -> jax.stages.Compiled:
    """The only step of a run, when every process has compiled it; from here on the time is that of steps."""
    with outputs.phase("compile", "compile") as said:
        compiled = compiling.result()
        said += [f"{compiled.seconds:.1f} s in all", *compiled.notes]
    all_have_compiled()
    outputs.time.begin_steps()
    return compiled.step


def train(run: Run, state: TrainState, compiling: Future[CompiledStep] | None, stop: StopRequest) -> Result:
    """The loop itself, from `state` to the last step or the first signal. compiling: None where no step is left."""
    config, num_steps, outputs, saver = run.config, run.config.train.num_steps, run.outputs, run.saver
    step = first = int(jax.device_get(state.step))
    outputs.open_records()
    recorder, evaluate = Recorder(config, outputs), make_evaluator(config, run.corpus, run.mesh)
    pace = Pace(outputs.say)
    layout = BatchLayout(run.mesh, config.train.num_microbatches, config.data.batch_sequences, config.data.sequence_length)
    reader = RowReader(run.corpus, run.timeline, config)
    ledger = Ledger(run.folder.ledger, reader, config, first, layout.places)
    batches = train_batches(run.corpus, run.timeline, config, first, layout.places)
    metrics = validation = None  # of the step before; the last one

    def save():
        recorder.sync()  # a committed step's past is on the disk
        ledger.sync()
        with recorder.untimed("save stall"):
            saver.save(step, state, data_position(run.timeline, config, step))
        outputs.time.flush(step)  # a later start that goes on from here has lost what comes after this line

    def draw():
        """This process's rows of step `step`, the replaced ones entered in the ledger."""
        is_idle = metrics is None or metrics.loss.is_ready()  # else the devices have work until the batch is there
        with outputs.time.spent_on("data wait" if is_idle else "step"):
            rows = next(batches)
        if "replaced" in rows:
            ledger.enter(step, rows["replaced"])
        return layout.split(rows)

    stopped = step < num_steps and stop.is_due(step)
    if step < num_steps and not stopped:
        batch = draw()
        train_step = _wait_for(compiling, outputs)
        recorder.start_clock(matmul_seconds(config, run.mesh.size))
    with jax.transfer_guard("disallow"):
        while step < num_steps and not stopped:
            if step > first:
                if config.guard.compare_every and step % config.guard.compare_every == 0:
                    with recorder.untimed("step"):
                        check_copies(parts(state), step)
                if step % config.checkpoint.save_every == 0:
                    save()
                # Nothing may come between a save and the next batch: the data position is the step alone.
                batch = draw()
            pace.busy()
            state, metrics = train_step(state, batch)
            recorder.write()
            pace.free()
            step += 1
            extra = {}
            if step == num_steps or (config.train.eval_every and step % config.train.eval_every == 0):
                jax.block_until_ready(metrics)
                with recorder.untimed("evaluation"):
                    validation = bits_per_byte(evaluate(state), run.corpus)
                extra = {"validation_bits_per_byte": validation}
            recorder.hold(step - 1, metrics, extra)
            saver.poll()
            stopped = step < num_steps and stop.is_due(step)
        if step > first:
            save()
        with recorder.untimed("save stall"):
            saver.wait()
    return Result(step, stop.signal if stopped else None, validation)
