"""Processes that tell one another things over loopback, without a model."""

import sys
from pathlib import Path

import many
import pytest

from k2jax import processes

TOY = Path(__file__).parent / "toy_process.py"


def together(folder: Path, count: int, work: str) -> many.Ended:
    address = f"127.0.0.1:{many.free_port()}"
    return many.run(folder, [[sys.executable, str(TOY), address, str(count), str(i), work] for i in range(count)], 60)


def test_alone_everything_returns_at_once():
    assert (processes.index(), processes.count(), processes.is_first(), processes.is_joined()) == (0, 1, True, False)
    assert processes.gather("x", [1]) == [[1]] and processes.on_first("x", lambda: 5) == 5
    processes.barrier("x", 0)
    processes.leave()


def test_what_the_first_does_alone_may_take_hours(monkeypatch):
    """An index of all stores, say; the others need no patience to hear that it fails."""
    waits = []
    monkeypatch.setattr(processes, "_client", object())
    monkeypatch.setattr(processes, "gather", lambda name, value, seconds: waits.append(seconds) or [value])
    assert processes.on_first("index", lambda: "made") == "made" and waits[0] >= 12 * 3600


@pytest.mark.slow
def test_three_processes_talk(tmp_path):
    ended = together(tmp_path, 3, "talk")
    assert ended.codes == [0, 0, 0], ended.outputs


@pytest.mark.slow
def test_steps_are_those_that_the_first_sees(tmp_path):
    ended = together(tmp_path, 2, "one_sees_an_old_listing")
    assert ended.codes == [0, 0], ended.outputs


@pytest.mark.slow
def test_one_that_fails_ends_all_with_its_code_and_words(tmp_path):
    ended = together(tmp_path, 3, "one_fails")
    assert ended.codes == [2, 2, 2] and ended.seconds < 5, ended
    assert all("process 1 failed: field: 3: must be 4\nother: 5: must be 6" in ended.outputs[i] for i in (0, 2))
    assert "k2jax: process 1: field: 3: must be 4" in ended.outputs[1]
    words = {path.name: path.read_text() for path in (tmp_path / "ranks").iterdir()}
    assert {*words} == {"0.failed", "1.failed", "2.failed"} and "process 1 of 3: field: 3" in words["1.failed"]


@pytest.mark.slow
def test_one_that_does_not_come_is_named(tmp_path):
    ended = together(tmp_path, 3, "one_is_late")
    assert ended.codes[0] == ended.codes[2] == 1
    assert "here: not every process came within 2 s" in ended.outputs[0] and "task names: 1" in ended.outputs[0].replace("\n", " "), ended.outputs[0]


@pytest.mark.slow
def test_a_broken_connection_is_not_shown_as_the_failure(tmp_path):
    ended = together(tmp_path, 2, "one_fails_in_a_collective")
    assert ended.codes == [1, 1] and "Traceback" not in ended.outputs[0], ended
    assert "process 1 failed: of process 1" in ended.outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["one_fails_without_terminal", "another_is_without_terminal"])
def test_output_that_nobody_takes_keeps_no_process_from_its_end(tmp_path, work):
    ended = together(tmp_path, 2, work)
    assert ended.codes == [2, 2] and ended.seconds < 5 and "of process" in ended.outputs[0], ended


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_named(tmp_path):
    ended = together(tmp_path, 3, "one_has_a_directory_of_its_own")
    rule = "is another directory than that of process 0 ("
    assert ended.codes == [2, 2, 2], ended
    assert all(rule in text and "'run', process 1 (" in text for text in ended.outputs), ended
    assert not [*tmp_path.glob("*/run/*")]
