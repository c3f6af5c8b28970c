"""Every second of a run's starts is of one kind, and what a later start repeats is lost."""

import itertools

import pytest

from k2jax.cli.main import main
from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.runs import goodput
from k2jax.runs.folder import RunFolder, write_config


class Clock:
    """Stands for the module time: it moves by what the test says."""

    def __init__(self):
        self.now, self.day = 100.0, 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.day + self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def steps(log: goodput.TimeLog, clock: Clock, first: int, last: int, seconds: float, save_every: int = 5) -> None:
    """Steps of `seconds` each, of which a quarter is spent on waiting for data; a save of 0.5 s."""
    for step in range(first, last):
        with log.spent_on("data wait"):
            clock.pass_(seconds / 4)
        clock.pass_(seconds * 3 / 4)
        log.tick(step + 1)
        if (step + 1) % save_every == 0:
            with log.spent_on("save stall"):
                clock.pass_(0.5)
            log.flush(step + 1)


def begin(path, clock: Clock, step: int) -> goodput.TimeLog:
    """A start of 3 s, of them 2 of compiling."""
    log = goodput.TimeLog(path, step)
    clock.pass_(1)
    with log.spent_on("compile"):
        clock.pass_(2)
    log.begin_steps()
    return log


def kill(log: goodput.TimeLog) -> None:
    """As the operating system does for a killed process."""
    log._file.close()


def test_all_seconds_of_one_start(tmp_path, clock):
    """By hand: 1 s start, 2 compile, 10 steps of 4 s, a quarter of it waiting, and two saves."""
    log = begin(tmp_path / "time.jsonl", clock, 0)
    steps(log, clock, 0, 10, 4.0)
    log.close()
    seconds = goodput.account(starts := goodput.read_starts(tmp_path / "time.jsonl"))
    expected = {"step": 30.0, "start": 1.0, "compile": 2.0, "data wait": 10.0, "save stall": 1.0}
    assert seconds == pytest.approx(dict.fromkeys(goodput.KINDS, 0.0) | expected)
    assert starts[0].ended and sum(seconds.values()) == pytest.approx(clock.now - 100)


@pytest.mark.parametrize("killed_at", [5, 7, 9])
def test_what_a_later_start_repeats_is_lost(tmp_path, clock, killed_at):
    """Killed after some steps past the save of step 5, and begun again 20 s later."""
    path = tmp_path / "time.jsonl"
    log = begin(path, clock, 0)
    steps(log, clock, 0, killed_at, 40.0)  # slower than FLUSH_SECONDS: each step has a line
    kill(log)
    clock.pass_(20)
    log = begin(path, clock, 5)
    steps(log, clock, 5, 10, 40.0)
    log.close()
    seconds = goodput.account(starts := goodput.read_starts(path))
    lost = killed_at - 5
    assert seconds["step"] == pytest.approx(300) and seconds["lost work"] == pytest.approx(30 * lost)
    assert seconds["restart"] == pytest.approx(20) and sum(seconds.values()) == pytest.approx(clock.now - 100)
    assert [(s.first, s.last, s.kept, s.ended) for s in starts] == [(0, killed_at, 5, False), (5, 10, 10, True)]


def test_a_start_that_goes_back_further_loses_more(tmp_path, clock):
    """The third start goes on from step 0, as the save of step 5 was damaged: both others lose all their steps."""
    path = tmp_path / "time.jsonl"
    for first, last in ((0, 7), (5, 8), (0, 5)):
        log = begin(path, clock, first)
        steps(log, clock, first, last, 40.0)
        kill(log)
    starts = goodput.read_starts(path)
    assert [start.last - start.kept for start in starts] == [7, 3, 0]
    assert goodput.account(starts)["lost work"] == pytest.approx(30 * 10)


def test_a_clock_that_was_set_back_takes_nothing_away(tmp_path, clock):
    path = tmp_path / "time.jsonl"
    begin(path, clock, 0).close()
    clock.day -= 86_400
    begin(path, clock, 0).close()
    seconds = goodput.account(goodput.read_starts(path))
    assert seconds["restart"] == 0 and min(seconds.values()) >= 0 and seconds["compile"] == 4


def test_kinds_nest(tmp_path, clock):
    log = goodput.TimeLog(tmp_path / "time.jsonl", 0)
    with log.spent_on("evaluation"):
        clock.pass_(1)
        with log.spent_on("data wait"):
            clock.pass_(2)
        clock.pass_(4)
    log.close()
    seconds = goodput.account(goodput.read_starts(tmp_path / "time.jsonl"))
    assert seconds["evaluation"] == 5 and seconds["data wait"] == 2 and seconds["start"] == 0


def test_a_process_without_a_file_keeps_nothing(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(tmp_path)
    log = begin(None, clock, 3)
    steps(log, clock, 3, 6, 40.0)
    log.close()
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_named_or_harmless(tmp_path, clock):
    path = tmp_path / "time.jsonl"
    begin(path, clock, 0).close()
    content, before = path.read_bytes(), goodput.read_starts(path)
    for at, bit in itertools.product(range(len(content)), range(8)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            after = goodput.read_starts(path)
        except UserError:
            continue
        assert after == before or len(path.read_bytes().split(b"\n")) != content.count(b"\n") + 1, (at, bit)


def test_the_command(tmp_path, clock, capsys):
    write_config(tmp_path, Config())
    assert main(["goodput", str(tmp_path)]) == 2 and "no start of this run has kept" in capsys.readouterr().err
    path = RunFolder(tmp_path).time
    log = begin(path, clock, 0)
    steps(log, clock, 0, 7, 40.0)
    kill(log)
    clock.pass_(20)
    log = begin(path, clock, 5)
    steps(log, clock, 5, 10, 40.0)
    log.close()
    assert main(["goodput", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("goodput 59.") and "0 to 7" in said and "killed" in said and "by itself" in said, said
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    assert '"lost work": 60.0' in capsys.readouterr().out
