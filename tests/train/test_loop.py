"""One run, in this process: what it compiles and when, the cache of compiled programs, and the transfer guard."""

import contextlib
import errno
import itertools
import os
import types
from pathlib import Path

import jax
import micro
import pytest

from k2jax.errors import RunFailed, UserError
from k2jax.runs.goodput import account, read_starts
from k2jax.runs.records import RecordFile, read_records
from k2jax.sharding.mesh import single_device_mesh
from k2jax.train import loop, mistakes
from k2jax.train import start as start_module
from k2jax.train.batch import BatchLayout
from k2jax.train.display import Display
from k2jax.train.metrics import WALL_CLOCK
from k2jax.train.start import check_source

BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        for module in (start_module, mistakes):
            patch.setattr(module, "make_mesh", lambda config: single_device_mesh())
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield patch
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def config(tmp_path_factory, patch):
    folder = tmp_path_factory.mktemp("loop")
    micro.make_store(folder)
    values = {"run_dir": str(folder / "run"), "eval_every": 2, "num_steps": 5, "log_every": 100}
    changes = {f"train.{name}": value for name, value in values.items()}
    return micro.config().replace(changes | {"data.path": str(folder / "store"), "checkpoint.save_every": 2})


def start(config) -> list:
    """Train and say what happened in which order: names of compiled programs, and numbers of recorded steps."""
    events, write = [], RecordFile.write

    def listen(event: str, duration: float, **known) -> None:
        if event == BACKEND_COMPILE:
            events.append(known["fun_name"])

    def recorded(self, record):
        events.append(record["step"])
        write(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordFile, "write", recorded)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            loop.run(config)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    return events


@pytest.fixture(scope="module")
def starts(config):
    """Events of a run that validates and saves twice, and of its resume; and what both said."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "say", lambda self, text: said.append(text))
        first = start(config)
        second = start(config.replace({"train.num_steps": 10}))
    return first, second, [text for text in said if text.startswith("compile:")]


def test_one_compile_a_run(starts):
    """The step compiles once a start; after the first validation and save nothing compiles at all."""
    for events, steps in zip(starts[:2], (range(5), range(5, 10)), strict=True):
        assert [e for e in events if isinstance(e, int)] == list(steps)
        assert sum("train_step" in str(e) for e in events) == 1, events
        settled = events.index(steps[3])
        assert not [e for e in events[settled:] if isinstance(e, str)], events
        assert [e for e in events[:settled] if isinstance(e, str)]


def test_the_share_of_the_matmul_rate_is_of_the_same_work_each_step(config, starts):
    """In every record, and a number for TensorBoard: share times seconds are the model FLOPs at one start's rate."""
    records = read_records(Path(config.train.run_dir) / "metrics.jsonl")
    work = [record["matmul_share"] * record["seconds"] for record in records]
    assert len(work) == 10 and min(record["matmul_share"] for record in records) > 0
    for one_start in (work[:5], work[5:]):
        assert one_start == pytest.approx([one_start[0]] * 5)
    assert "matmul_share" in WALL_CLOCK


def test_second_start_finds_the_compiled_step(config, starts):
    first, second = starts[2]
    folder = Path(config.train.run_dir) / "compiled"
    assert first.endswith(f" s in all, not in the cache, {folder}") and second.endswith(f" s in all, found in the cache, {folder}")
    assert any("train_step" in entry.name for entry in folder.iterdir())
    assert jax.config.jax_compilation_cache_dir is None  # other work of this process goes on without


def test_every_second_of_both_starts_has_a_kind(config, starts):
    """The kinds of a start add up to the wall clock between its first line and its last."""
    found = read_starts(Path(config.train.run_dir) / "time.jsonl")
    assert [(start.first, start.last, start.kept, start.ended) for start in found] == [(0, 5, 5, True), (5, 10, 10, True)]
    for start in found:
        assert sum(start.seconds.values()) == pytest.approx(start.unix[1] - start.unix[0], abs=0.2)
        assert min(start.seconds[kind] for kind in ("start", "step", "evaluation", "save stall")) > 0
    seconds = account(found)
    assert found[1].seconds["restore"] > 0 and seconds["restart"] > 0 and seconds["lost work"] == 0


class Killed(BaseException):
    """Nothing of ours catches it."""


def test_a_kill_at_any_file_before_the_first_step_can_be_started_again(config, tmp_path, patch):
    """Killed before and after each file of the run directory gets its name; the next start comes as far as the saver."""
    replace = os.replace

    def run(folder, kill_at, after):
        names = []

        def counted(temporary, path):
            names.append(Path(path).name)
            if len(names) == kill_at and not after:
                raise Killed
            replace(temporary, path)
            if len(names) == kill_at:
                raise Killed

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(os, "replace", counted)
            inner.setattr(start_module, "Saver", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                loop.run(config.replace({"train.run_dir": str(folder)}))
        return names

    files = run(tmp_path / "whole", 0, False)
    assert {"config.json", "timeline.json"} <= {*files}
    for number, after in itertools.product(range(1, len(files) + 1), (False, True)):
        folder = tmp_path / f"{number}{after}"
        assert run(folder, number, after) == files[:number]
        again = [name for name in run(folder, 0, False) if name != "run.json"]  # which, once there, stays
        assert again == [name for name in files if name != "run.json"]
    source = {"train.run_dir": str(tmp_path / "whole"), "train.init_from": str(tmp_path / "none")}
    with pytest.raises(UserError, match="none: no such folder"):  # before step 0 the model is still to come from there
        check_source(config.replace(source), None)


def test_what_a_start_left_that_the_others_could_not_follow_is_no_stranger(config, tmp_path):
    """The last words of processes that ended before config.json was there, and a test of writing that was killed."""
    for name in ("lock", ".write-test-ab12", "config.json.tmp", "ranks/1.failed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert start_module.check_run_dir(config.replace({"train.run_dir": str(tmp_path)})) == {}


def test_a_cache_that_cannot_be_made_is_the_users_mistake(config, tmp_path):
    (tmp_path / "file").write_text("")
    changes = {"train.compile_cache": str(tmp_path / "file" / "cache"), "train.run_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="train.compile_cache = .*: Not a directory; give another, or none"):
        loop.run(config.replace(changes))


# a run that fails leaves the closing of its files to the end of the process
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hidden_transfer_fails(config, starts, patch):
    """A batch that is still on the host: each step would wait for it."""
    split = BatchLayout.split
    calls = []

    def on_the_host(layout, rows):
        calls.append(rows)
        batch = split(layout, rows)
        return batch if len(calls) == 1 else jax.device_get(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLayout, "split", on_the_host)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.run(config.replace({"train.num_steps": 13}))
    assert len(calls) == 2


class Ended(BaseException):
    """The end of a process of many."""


def test_a_process_of_many_says_why_it_fails_even_if_its_files_cannot_be_closed(config, monkeypatch):
    """Its part in a save that is under way would wait for the others, and these for it."""
    told = []

    def fail(error):
        told.append(error)
        raise Ended

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def opened(*_):
        yield types.SimpleNamespace(outputs=types.SimpleNamespace(close=full))

    for name, value in {"count": lambda: 2, "fail": fail, "open_run": opened, "is_on": full}.items():
        monkeypatch.setattr(loop, name, value)
    with pytest.raises(Ended):
        loop.run(config)
    assert [error.errno for error in told] == [errno.ENOSPC]


def test_the_model_to_begin_with_is_of_one_step_for_all(monkeypatch):
    """Its run may still save: processes that looked for themselves could read two steps, and wait for one another."""
    asked = []
    monkeypatch.setattr(start_module, "parts", lambda state: {"model": {}})
    monkeypatch.setattr(start_module, "newest_step", lambda folder: 8)
    monkeypatch.setattr(start_module, "on_first", lambda name, function: function() - 4)
    monkeypatch.setattr(start_module, "restore_model", lambda folder, step, layout: asked.append(step) or {})
    start_module.with_model_of("source", start_module.TrainState(None, None, None, None, None))
    assert asked == [4]


def test_processes_compare_the_held_out_store_too(config, monkeypatch, patch, tmp_path):
    """Rows of another one would give a figure of neither."""
    asked = []

    def check(folder, digests, state_bytes):
        asked.append(digests)
        raise Ended

    monkeypatch.setattr(start_module, "check_storage", check)
    held_out = config.replace({"data.validation_path": config.data.path, "train.run_dir": str(tmp_path)})
    for given in (config.replace({"train.run_dir": str(tmp_path)}), held_out):
        with pytest.raises(Ended):
            loop.run(given)
    digest = asked[0]["digest of data.path"]
    assert asked[0] == {"digest of data.path": digest, "digest of data.validation_path": None}
    assert asked[1] == {"digest of data.path": digest, "digest of data.validation_path": digest}


@pytest.mark.parametrize(("error", "waits"), [(RunFailed("bad rows"), True), (OSError(errno.ENOSPC, "full"), False)])
def test_a_save_that_has_begun_is_ended_before_a_failure_that_breaks_nothing(config, monkeypatch, error, waits):
    """For as long as a save may take; what another process may have broken ends this one at once."""
    order = []
    saver = types.SimpleNamespace(is_saving=lambda: True, join=lambda seconds: order.append(seconds))
    outputs = types.SimpleNamespace(close=lambda: order.append("closed"))
    monkeypatch.setattr(loop, "fail", lambda error: order.append(error))
    loop.fail_with_others(types.SimpleNamespace(saver=saver, outputs=outputs, config=config), error)
    assert order == [*[config.checkpoint.save_timeout_seconds] * waits, "closed", error]
