"""The start of a run: from which step, with which state. Everything is checked before anything is written."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from k2jax.config import Config, differences
from k2jax.data.loader.batches import check_position, data_position
from k2jax.data.loader.corpus import Corpus, open_data, writes_alike
from k2jax.data.loader.segments import describe_mixture, read_segments, settle_timeline
from k2jax.data.loader.timeline import Timeline, make_timeline
from k2jax.data.saved_tokenizer import open_tokenizer
from k2jax.errors import UserError
from k2jax.preflight.ranks import check_agreement, check_axes, check_storage
from k2jax.processes import WORK_PATIENCE, count, gather, index, keep_last_words, on_first
from k2jax.runs.commits import (
    committed_steps,
    damage,
    find_damaged,
    newest_step,
    not_ours,
    read_record,
    remove_leftovers,
    set_aside,
)
from k2jax.runs.folder import RunFolder, read_config
from k2jax.runs.mirror import (
    hold_run,
    join_run,
    leave_run,
    open_run_folder,
    run_folder,
    shown,
    upload,
    uploading,
)
from k2jax.sharding.mesh import make_mesh
from k2jax.train.banner import banner, total_bytes
from k2jax.train.checkpoint import Saver, parts, restore_model, restore_state
from k2jax.train.mistakes import check_run_dir, check_start
from k2jax.train.optimizer import make_optimizer
from k2jax.train.outputs import Outputs, describe_run
from k2jax.train.state import TrainState, abstract_state, init_state

INDEX_SECONDS = 6 * 3600  # of packing a large store for the first time


def check_source(config: Config, corpus: Corpus) -> None:
    """Raise UserError if train.init_from is no run with a sound model of the same shape and tokenizer."""
    source = config.train.init_from
    if source is None or newest_step(run_folder(config.train.run_dir).checkpoints) is not None:  # needed no more
        return
    files = open_run_folder(source)
    other, step = read_config(files.path), newest_step(files.checkpoints)
    if step is None:
        raise UserError(f"train.init_from = {source!r}: has no committed checkpoint")
    free = ("model.initializer_range", *(f"model.rope.{f.name}" for f in dataclasses.fields(config.model.rope)))
    problems = [
        f"{name} = {new!r}: must be {old!r}, as train.init_from = {source!r} has"
        for name, (old, new) in differences(other, config).items()
        if name == "model.rope.rope_theta" or (name.startswith("model.") and name not in free)  # YaRN may come later
    ]
    if files.tokenizer.is_dir() and not writes_alike(open_tokenizer(files.tokenizer), corpus):
        problems.append(f"data.path = {corpus.path!r}: was written by another tokenizer than that of {source!r}")
    if problems := problems + damage(files.checkpoints, step):
        raise UserError(*problems)


def make_run_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.run_dir = {str(folder)!r}: cannot be made: {error.strerror}; give another") from None


def find_step(config: Config) -> tuple[int | None, list[str]]:
    """(the newest sound step, None for a new run; what is wrong with the steps after it, which are set aside).

    In all processes at once, which share the reading. Raises UserError if steps are there, and none is sound.
    """
    files = run_folder(config.train.run_dir)
    folder = files.checkpoints

    # Of a folder that hosts share each may see another state: all go by what the first sees, and end alike.
    steps = on_first("steps", lambda: committed_steps(folder))

    def wrong(folder: Path, step: int) -> list[str]:
        found = gather("damage", damage(folder, step, index(), count()), WORK_PATIENCE)
        return list(dict.fromkeys(problem for part in found for problem in part))  # a bad record is one to all

    bad, problems = find_damaged(folder, steps, wrong)

    def settle() -> int | None:
        set_aside(folder, bad, problems)
        return newest_step(folder)

    return on_first("newest step", settle), [*problems, *([f"moved to {shown(files.damaged)}"] if problems else [])]


def check_resume(config: Config, corpus: Corpus, step: int | None, change_mixture: bool) -> tuple[Timeline, list[str]]:
    """The timeline of the run that goes on from `step`, and what to tell its user. UserError if it may not go on."""
    files = run_folder(config.train.run_dir)
    notes = [
        f"changed since the run began: {name} {old!r} -> {new!r}" for name, (old, new) in check_run_dir(config).items()
    ]
    timeline, changed = settle_timeline(corpus, config, read_segments(files.timeline), step or 0, change_mixture)
    if step is not None:
        check_position(read_record(files.checkpoints, step)["data_position"], timeline, config, step)
    return timeline, notes + changed


def with_model_of(source: str, state: TrainState) -> TrainState:
    """`state` with the newest model of another run, on whatever mesh that was."""
    folder = open_run_folder(source).checkpoints
    step = on_first("source", lambda: newest_step(folder))  # it may be a run that still saves
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts(state)["model"])
    return dataclasses.replace(state, **restore_model(folder, step, layout))


@dataclass(frozen=True)
class Run:
    """An open run: everything that training needs besides the state. Its folder is locked by the first process.

    abstract: shapes, dtypes and shardings of the state. resumed_step: the committed step that it goes on from, None for
    a new run. saver, outputs: closed with the run.
    """

    config: Config
    folder: RunFolder
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformation
    abstract: TrainState
    corpus: Corpus
    timeline: Timeline
    resumed_step: int | None
    saver: Saver
    outputs: Outputs


def _check_before(config: Config, corpus: Corpus, change_mixture: bool) -> None:
    """All that can be wrong with the run directory and the stores, before anything is written."""
    files = run_folder(config.train.run_dir)
    settle_timeline(corpus, config, read_segments(files.timeline), newest_step(files.checkpoints) or 0, change_mixture)
    check_source(config, corpus)


def _open_data(config: Config) -> Corpus:
    """The stores, opened by the first process before the others, since indexes of them may have to be written."""
    on_first("stores", lambda: open_data(config) and None, INDEX_SECONDS)
    return open_data(config)


@contextlib.contextmanager
def open_run(config: Config, change_mixture: bool) -> Iterator[Run]:
    """The run of `config`, locked, checked and described in its folder; `jax.set_mesh` holds inside.

    Everything is checked before anything is written, and all that is shared by the first process alone. Raises
    UserError with what the user can correct.
    """
    check_agreement(config)
    check_start(config)  # the run directory again below, under the lock
    mesh = make_mesh(config.mesh)
    corpus, folder = _open_data(config), run_folder(config.train.run_dir)
    on_first("check", lambda: _check_before(config, corpus, change_mixture))
    tx = make_optimizer(config, mesh)
    with contextlib.ExitStack() as held, jax.set_mesh(mesh):

        def lock() -> str:
            make_run_dir(folder.path)
            return held.enter_context(hold_run(folder.path))

        join_run(folder.path, on_first("lock", lock))
        keep_last_words(folder.ranks, lambda: leave_run(folder.path))
        abstract = abstract_state(config, tx, mesh)
        digests = {"data.path": corpus.digest, "data.validation_path": corpus.validation_digest}
        read = {f"digest of {name}": digest for name, digest in digests.items()}
        check_storage(folder.path, read, total_bytes(abstract))
        step, damaged = find_step(config)

        def describe() -> tuple[list[dict], list[str]]:
            timeline, notes = check_resume(config, corpus, step, change_mixture)
            describe_run(folder, config, timeline.segments, corpus.tokenizer())
            upload(folder.path)
            return timeline.segments, notes

        held.enter_context(uploading(folder.path))
        segments, notes = on_first("describe", describe)
        outputs = Outputs(folder, config, step or 0)
        held.callback(outputs.close)
        saver = Saver(folder.checkpoints, config.checkpoint, outputs.watchdog.committed)
        held.callback(saver.join)  # a failure elsewhere loses no save that had begun
        run = Run(config, folder, mesh, tx, abstract, corpus, make_timeline(segments, config), step, saver, outputs)
        outputs.say("\n".join([banner(config, abstract, mesh),
                               describe_mixture(run.timeline, config), *damaged, *notes]))  # fmt: skip
        if count() > 1:
            outputs.say(check_axes(mesh))
        yield run


def start_state(run: Run) -> TrainState:
    """The state committed at `run.resumed_step`, or for a new run the initial one, committed as step 0."""
    folder = run.folder.checkpoints
    removed, strangers = on_first("leftovers", lambda: (remove_leftovers(folder), not_ours(folder)))
    if removed:
        run.outputs.say(f"removed unfinished saves: {', '.join(removed)}")
    if strangers:
        run.outputs.say(f"left alone, not made by k2jax: {', '.join(strangers)} in {folder}")
    if run.resumed_step is not None:
        with run.outputs.phase(f"restore step {run.resumed_step}", "restore"):
            return restore_state(folder, run.resumed_step, run.abstract)
    with run.outputs.phase("initialise", "start"):
        state = init_state(run.config, run.tx)
        if run.config.train.init_from is not None:
            state = with_model_of(run.config.train.init_from, state)
        run.saver.save(0, state, data_position(run.timeline, run.config, 0))
        run.saver.wait()
    return state
