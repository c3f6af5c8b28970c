"""The display of a preparation."""

import io

import pytest
from rich.console import Console

from k2jax.cli import data
from k2jax.data.text.progress import Progress


def at(seconds, documents, tokens, size, task="write", before=(5, 0, 50, 100)):
    return Progress(task, (1, 4), documents, 0, tokens, (size, 1100), seconds, before)


@pytest.mark.parametrize(
    "progress, shown",
    [
        (
            at(10.0, 25, 550, 600),
            "2 documents/s, 50 tokens/s, 0:00:10 left",
        ),  # of this run: 20, 500 and half of the rest
        (at(3600.0, 1005, 50, 200), "0 documents/s, 9:00:00 left"),
        (at(0.0, 5, 50, 100), ""),
    ],
)
def test_rates_are_of_this_run_alone(progress, shown):
    assert data._rates(progress) == shown


def test_lines_where_there_is_no_terminal_and_bars_where_there_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    output = io.StringIO()
    with data._progress_bars(Console(file=output, width=100)) as show:
        for now[0] in (5.0, 11.0, 12.0, 30.0):
            show(at(now[0], 25, 550, 600))
    assert [line.partition(",")[0] for line in output.getvalue().splitlines()] == ["write: 55%", "write: 55%"]
    output = io.StringIO()
    with data._progress_bars(Console(file=output, width=100, force_terminal=True)) as show:
        show(at(10.0, 25, 550, 600, "read"))
        show(at(10.0, 25, 550, 600))
    assert (
        "read" in output.getvalue()
        and "write" in output.getvalue()
        and "50 tokens/s, 0:00:10 left" in output.getvalue()
    )
