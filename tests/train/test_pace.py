"""The process that holds up the others is named, and none where all are alike."""

from k2jax.train import pace
from k2jax.train.pace import Pace, slowest


def test_one_is_slower_than_most():
    assert slowest({0: 0.01, 1: 0.31, 2: 0.02, 3: 0.01}, 0.5) == (
        "process 1 holds up the others: 0.31 s of a step of 0.50 s on its host, most have 0.01 s"
    )
    assert slowest({0: 0.01, 1: 0.31}, 0.5).startswith("process 1 holds up")


def test_all_alike_or_little():
    assert slowest({0: 0.3, 1: 0.31, 2: 0.29}, 0.5) is None  # a loader that is slow everywhere
    assert slowest({0: 0.01, 1: 0.08}, 0.5) is None and slowest({0: 0.001, 1: 0.015}, 0.02) is None


def test_the_clock_runs_between_the_devices_end_and_their_next_step(monkeypatch):
    now, told, said = [0.0], [], []
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace, "count", lambda: 2)
    monkeypatch.setattr(pace, "publish", lambda name, value: told.append(value))
    monkeypatch.setattr(pace, "published", lambda name: {0: told[-1], 1: 0.0})
    clock = Pace(said.append)
    now[0] = 30.0  # of the start
    clock.busy()
    clock.free()
    for _ in range(2 * pace.EVERY):
        now[0] += 0.25  # on the host
        clock.busy()
        now[0] += 0.75  # on the devices
        clock.free()
    assert told == [0.25, 0.25] and said == ["process 0 holds up the others: 0.25 s of a step of 0.93 s on its host, most have 0.00 s",
                                             "process 0 holds up the others: 0.25 s of a step of 1.00 s on its host, most have 0.00 s"]  # fmt: skip
