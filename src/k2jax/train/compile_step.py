"""The training step, compiled from shapes alone: beside the making or restoring of a state, or for chips elsewhere."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import optax

from k2jax.config import Config
from k2jax.sharding.compile_options import program_options
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.compile_cache import cache_notes
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import TrainState, abstract_state
from k2jax.train.step import make_train_step


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes and shardings of one step's batch."""
    microbatches = config.train.num_microbatches
    shape = microbatches, config.data.batch_sequences // microbatches, config.data.sequence_length
    rows = jax.ShapeDtypeStruct(shape, "int32", sharding=jax.NamedSharding(mesh, spec("MBT")))
    return Batch(rows, rows, rows, rows)


def _lower(
    config: Config, tx: optax.GradientTransformation, state: TrainState, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    options = program_options(config.kernels, mesh)
    step = jax.jit(make_train_step(config, tx), donate_argnums=0, compiler_options=options)
    with jax.set_mesh(mesh):
        return step.lower(state, abstract_batch(config, mesh))


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    """The step that a run of `config` compiles, and the shapes of its state, which is donated."""
    tx = make_optimizer(config, mesh)
    state = abstract_state(config, tx, mesh)
    return _lower(config, tx, state, mesh), state


class CompiledStep(NamedTuple):
    """step: takes arrays of the shapes and layouts that it was compiled for, or raises. seconds: its own."""

    step: jax.stages.Compiled
    seconds: float
    notes: list[str]


def begin_compile(
    config: Config, tx: optax.GradientTransformation, state: TrainState, mesh: jax.sharding.Mesh
) -> Future[CompiledStep]:
    """Compile the step in a thread of its own. XLA cannot be interrupted: an interpreter that ends waits for it.

    state: its shapes, dtypes and shardings, as `abstract_state` gives them.
    """

    def compile_step() -> CompiledStep:
        started = time.monotonic()
        with cache_notes(threading.get_ident()) as notes:
            step = _lower(config, tx, state, mesh).compile()
        return CompiledStep(step, time.monotonic() - started, notes)

    pool = ThreadPoolExecutor(1, "compile")
    try:
        return pool.submit(compile_step)
    finally:
        pool.shutdown(wait=False)
