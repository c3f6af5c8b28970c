"""A stuck process is named in time, with its place, by itself or by the others; one that is not stuck is left alone."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import many
import pytest

from k2jax.config import WatchdogConfig
from k2jax.train.watchdog import Watchdog, place_of, verdict

TOY = Path(__file__).parents[1] / "toy_process.py"
RULE = "watchdog.step_seconds = 2 allows no more; stacks of all threads: ranks/*.stacks"


def together(folder, count, work):
    address = f"127.0.0.1:{many.free_port()}"
    return many.run(folder, [[sys.executable, str(TOY), address, str(count), str(i), work] for i in range(max(count, 1))], 60)


def report(changes, kind="step", seconds=9.4, place="train/loop.py:1 in train"):
    return {"changes": changes, "kind": kind, "seconds": seconds, "place": place}


def test_verdict_names_those_that_came_less_far():
    assert verdict({0: report(7), 1: report(6, "data wait"), 2: report(7)}, 3) == (
        "process 1 is stuck, the others wait: process 1: data wait for 9 s, train/loop.py:1 in train"
    )
    assert verdict({0: report(6), 1: report(6), 2: report(7)}, 3).startswith("processes 0 and 1 are stuck, the others wait: ")
    assert verdict({1: report(6)}, 3).startswith("processes 0 and 2 are stuck: no answer")
    assert verdict({0: report(6), 1: report(6)}, 2).startswith("no process goes on, all have come equally far: process 0")
    assert verdict({0: report(6, "restore")}, 1) == "stuck: restore for 9 s, train/loop.py:1 in train"


def test_place_is_the_innermost_of_ours():
    release, inside = threading.Event(), threading.Event()

    def listed(items):  # of k2jax by its file, as far as the place goes
        inside.set()
        release.wait()

    import k2jax.words

    code = listed.__code__.replace(co_filename=k2jax.words.__file__, co_freevars=listed.__code__.co_freevars)
    thread = threading.Thread(target=type(listed)(code, globals(), "listed", None, listed.__closure__), args=((),))
    thread.start()
    inside.wait()
    assert place_of(thread.ident).startswith("words.py:") and place_of(thread.ident).endswith(" in listed")
    release.set()
    thread.join()


def test_deadlines_by_kind():
    dog = Watchdog(WatchdogConfig(step_seconds=5, phase_seconds=None), Path("nowhere"))
    assert [dog.seconds(kind) for kind in ("step", "data wait", "restore", "save stall")] == [5, 5, float("inf"), float("inf")]


@pytest.mark.slow
def test_a_process_that_sleeps_is_named_by_all(tmp_path):
    ended = together(tmp_path, 3, "one_sleeps")
    assert ended.codes == [124] * 3 and ended.seconds < 6, ended
    for output in ended.outputs:
        assert "process 2 is stuck, the others wait: process 2: step for 2 s, toy_process.py:" in output and RULE in output
    stacks = {path.name: path.read_text() for path in (tmp_path / "ranks").glob("*.stacks")}
    assert {*stacks} == {"0.stacks", "1.stacks", "2.stacks"} and "in _steps" in stacks["2.stacks"]


@pytest.mark.slow
def test_a_process_that_keeps_the_interpreter_is_named_by_the_others(tmp_path):
    ended = together(tmp_path, 2, "one_keeps_the_interpreter")
    assert ended.codes[0] == 124 and f"process 1 is stuck: no answer, as of a host or a Python that stands still; {RULE}" in ended.outputs[0], ended
    assert ended.codes[1] not in (0, None)


@pytest.mark.slow
def test_one_alone_and_a_phase(tmp_path):
    ended = together(tmp_path, 0, "all_wait")
    assert ended.codes == [124] and "stuck: restore for 1 s, " in ended.outputs[0] and "watchdog.phase_seconds = 1 allows" in ended.outputs[0], ended
    assert "in all_wait" in (tmp_path / "ranks/0.stacks").read_text()


@pytest.mark.grid
def test_a_process_that_stood_still_is_not_stuck(tmp_path):
    command = [sys.executable, str(TOY), "none", "0", "0", "one_stands_still"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=many.ENVIRONMENT)
    try:
        assert process.stdout.readline() == "stop me\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "done\n" and process.returncode == 0
    finally:
        process.kill()
        process.wait()
