"""The timeline against a row-by-row count, and what a run may change of it."""

import numpy as np
import pytest

from k2jax.config import Config
from k2jax.data.loader.batches import check_position, data_position
from k2jax.data.loader.segments import (
    _natural,
    _natural_problems,
    continue_segments,
    describe_mixture,
    mixture_problems,
)
from k2jax.data.loader.shuffle import permute, unpermute
from k2jax.data.loader.timeline import Skips, Timeline, make_timeline, permutation_key
from k2jax.errors import UserError

B, T = 24, 8


def segment(phases, windows, from_step=0, store="s", **epochs):
    sources = {n: {"windows": w, "epochs": epochs.get(n), "store": store, "packing": None} for n, w in windows.items()}
    return {"from_step": from_step, "path": "p", "digest": store, "sources": sources, "phases": phases}


def timeline_of(*plan, skips=None, batch=B):
    return Timeline(list(plan), seed=3, batch=batch, batch_tokens=batch * T, skips=Skips(skips))


WINDOWS = {"code": 50, "web": 301, "wiki": 17}
STAGES = [[0, {"web": 7, "code": 2, "wiki": 1}], [5 * B * T - 3, {"web": 1, "wiki": 1}], [9 * B * T, {"code": 5}]]


def naive(timeline, plan, rows, skips=()):
    """(name, epoch, window) row after row: within each stage the source that is furthest behind its share comes next."""
    given = {name: 0 for name in timeline.names}
    result, block, turn = [], None, []
    for row in range(rows):
        data_step = row // timeline.batch
        step = data_step - sum(min(stop, data_step + 1) - first for first, stop in skips if first <= data_step)
        step = max(step, 0)
        part = [p for p in plan if p["from_step"] <= step][-1]
        stage = sum(step * timeline.batch * T >= tokens for tokens, _ in part["phases"]) - 1
        shares = part["phases"][stage][1]
        if (part["from_step"], stage) != block:
            block, turn = (part["from_step"], stage), []
        if not turn:
            slots = [
                ((2 * k + 1) / (2 * shares[n]), timeline.names.index(n), n) for n in shares for k in range(shares[n])
            ]
            turn = [name for *_, name in sorted(slots)]
        name = turn.pop(0)
        size = part["sources"][name]["windows"]
        epoch, index = divmod(given[name], size)
        result.append((name, epoch, permute(index, size, permutation_key(3, epoch, f"train/{name}"))))
        given[name] += 1
    return result


def located(timeline, rows):
    place = timeline.locate(np.arange(rows))
    return [(timeline.names[s], e, w) for s, e, w in zip(*(values.tolist() for values in place), strict=True)]


def test_rows_of_phases_one_by_one():
    plan = [segment(STAGES, WINDOWS)]
    timeline = timeline_of(*plan)
    expected = naive(timeline, plan, 40 * B)
    assert located(timeline, 40 * B) == expected
    rng = np.random.default_rng(0)
    rows = rng.permutation(40 * B)[:100].reshape(4, 25)
    place = timeline.locate(rows)
    assert [(timeline.names[s], w) for s, w in zip(place.source.ravel(), place.window.ravel())] == [
        expected[row][::2] for row in rows.ravel().tolist()
    ]
    for row in (0, 1, B, 5 * B, 5 * B + 1, 9 * B - 1, 40 * B):
        names = [name for name, *_ in expected[:row]]
        assert timeline.counts(row).tolist() == [names.count(name) for name in timeline.names]


def test_a_change_leaves_the_past():
    first, later = segment(STAGES, WINDOWS), segment([[s, {"wiki": 2, "web": 3}] for s, _ in STAGES], WINDOWS, 4)
    last = segment([[s, {"books": 2, "web": 3}] for s, _ in STAGES], {**WINDOWS, "books": 20}, 11)
    plan = [first, later, last]
    before, after = timeline_of(first), timeline_of(*plan)
    expected = naive(after, plan, 30 * B)
    assert located(after, 30 * B) == expected
    assert located(before, 4 * B) == expected[: 4 * B] and located(before, 5 * B) != expected[: 5 * B]
    assert before.digest(4) == after.digest(4) and before.digest(5) != after.digest(5)


def test_same_name_in_another_store_is_another_source():
    plan = [segment([[0, {"web": 1}]], {"web": 30}), segment([[0, {"web": 1}]], {"web": 40}, 2, store="new")]
    timeline = timeline_of(*plan)
    assert timeline.names == ["web", "web"] and timeline.counts(3 * B).tolist() == [2 * B, B]
    place = timeline.locate(np.arange(2 * B, 3 * B))
    assert set(place.source.tolist()) == {1} and not place.epoch.any()  # it begins with its own first pass


def test_every_sighting_of_every_window():
    """rows_of is the inverse of locate, through passes, phases, changes and skipped steps."""
    plan = [segment(STAGES, WINDOWS), segment([[s, {"wiki": 2, "web": 3}] for s, _ in STAGES], WINDOWS, 4)]
    timeline = timeline_of(*plan, skips=("2-3", "8-8"))
    found = located(timeline, 30 * B)
    for number, name in enumerate(timeline.names):
        for window in range(WINDOWS[name]):
            rows = [row for row, (n, _, w) in enumerate(found) if (n, w) == (name, window)]
            assert timeline.rows_of(number, window, 30 * B) == rows
            assert timeline.rows_of(number, window, 7 * B + 5) == [row for row in rows if row < 7 * B + 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4**4 + 1, 2**9 - 1, 2**9 + 1, 1000])
def test_unpermute(size):
    for key in (0, 7):
        assert [unpermute(permute(i, size, key), size, key) for i in range(size)] == list(range(size))


def test_skipped_steps():
    skips = Skips(("3-4", "7-7"))
    assert [skips.data_step(step) for step in range(8)] == [0, 1, 2, 5, 6, 8, 9, 10]
    assert [skips.next_data_step(steps) for steps in range(8)] == [0, 1, 2, 3, 6, 7, 9, 10]
    assert [skips.step_of(step) for step in range(10)] == [0, 1, 2, None, None, 3, 4, None, 5, 6]
    assert skips.before(4) == [[3, 4]] and skips.before(7) == [[3, 5]] and Skips(None).before(9) == []
    assert Skips(("0-1",)).data_step(0) == 2 and Skips(("0-1",)).next_data_step(0) == 0


def test_skipping_moves_the_rest_and_not_the_past():
    plan = [segment(STAGES, WINDOWS)]
    plain, skipping = timeline_of(*plan), timeline_of(*plan, skips=("3-4",))
    assert skipping.step_rows(3).tolist() == plain.step_rows(5).tolist()
    assert located(skipping, 30 * B) == naive(skipping, plan, 30 * B, [(3, 5)])
    config = Config().replace({"data.sequence_length": T, "data.batch_sequences": B, "data.seed": 3})
    for step in range(9):
        saved = data_position(plain, config, step)
        if step <= 3:
            check_position(saved, skipping, config, step)
        else:
            with pytest.raises(
                UserError, match=r"skipped is .* in the checkpoint and \[\[3, \d\]\] now; data.skip_steps may"
            ):
                check_position(saved, skipping, config, step)


def test_continue_segments():
    old = segment(STAGES, WINDOWS)
    new = segment([[s, {"web": 1}] for s, _ in STAGES], {**WINDOWS, "web": 300})
    assert continue_segments([], old, 0, False) == ([old], [])
    moved = old | {"path": "elsewhere"}
    assert continue_segments([old], moved, 9, False) == ([moved], [])
    with pytest.raises(UserError) as error:
        continue_segments([old], new, 9, False)
    assert len(error.value.problems) == 4 and all("give --change-mixture" in text for text in error.value.problems)
    plan, notes = continue_segments([old], new, 9, True)
    assert plan == [old, new | {"from_step": 9}] and len(notes) == 4
    assert continue_segments(plan, new, 20, True) == (plan, [])  # the same command again
    assert continue_segments(plan, old, 4, True)[0] == [old | {"from_step": 0}, old | {"from_step": 4}]
    assert continue_segments(plan, old, 0, True)[0] == [old]


class Sources:
    sources = {
        "web": {"derived_from": None, "variants": 0},
        "code": {"derived_from": None, "variants": 0},
        "wiki": {"derived_from": "web", "variants": 2},
    }


def problems(steps, max_repeats=None, windows=WINDOWS, **epochs):
    plan = [segment([[0, {"web": 7, "code": 2, "wiki": 1}]], windows, **epochs)]
    config = Config().replace(
        {
            "data.sequence_length": T,
            "data.batch_sequences": B,
            "train.num_steps": steps,
            "mixture.max_repeats": max_repeats,
        }
    )
    return list(mixture_problems(make_timeline(plan, config), Sources, config))


def test_a_source_that_runs_out_is_named_before_the_run():
    assert not problems(20, code=2) and not problems(10**9)
    # 20.8 steps are 500 rows, 100 of them code
    assert problems(21, code=2) == [
        "mixture.epochs: code runs out: the run needs 101 of its rows, but code=2 over 50 windows gives 100; give code=3, "
        "lower its weight, or set train.num_steps to at most 20"
    ]
    exactly = {**WINDOWS, "code": 48}  # 20 steps need 96 rows of code
    assert not problems(20, windows=exactly, code=2) and problems(20, windows=exactly, code=1)
    for steps in (20, 21, 22, 400):
        for epochs in (1, 2, 3):
            plan = [segment([[0, {"web": 7, "code": 2, "wiki": 1}]], WINDOWS)]
            needed = [name for name, *_ in naive(timeline_of(*plan), plan, steps * B)].count("code")
            assert bool(problems(steps, code=epochs)) == (needed > 50 * epochs)


def test_repeats_count_the_variants():
    # 48 steps: 1152 rows, 806 of web (2.7 passes: 3) and 115 of wiki (6.8 passes: 7, of 2 variants each)
    assert not problems(48, max_repeats=17)
    (problem,) = problems(48, max_repeats=16)
    assert "shows a document of web up to 17 times" in problem and "give at least 17" in problem


def test_the_banner_says_how_often():
    config = Config().replace({"data.sequence_length": T, "data.batch_sequences": B, "train.num_steps": 10})
    timeline = make_timeline([segment([[0, {"web": 3, "code": 1}]], {"web": 90, "code": 15})], config)
    assert describe_mixture(timeline, config) == "mixture    web 75.00%, 2 passes, code 25.00%, 4 passes"


def test_natural_weights_are_the_sizes():
    """In parts of ten thousand, 50 windows beside 3 million were seen six times as often."""
    assert _natural({"a": 6, "b": 9}) == {"a": 2, "b": 3} and _natural({"a": 7}) == {"a": 1}
    for windows in ({"a": 10, "b": 999_990}, {"a": 50, "b": 3_000_000}, {"a": 13_001, "b": 10**8, "c": 5 * 10**9}):
        weights, total = _natural(windows), sum(windows.values())
        parts = sum(weights.values())
        assert parts <= 1_000_000 and all(abs(weights[n] / parts - windows[n] / total) < 1e-6 for n in windows)
        assert abs(weights["a"] / parts * total / windows["a"] - 1) < 0.25
        assert not [*_natural_problems(segment([], windows))]
    (problem,) = _natural_problems(segment([], {"a": 100, "b": 3_784_179_687}))
    assert problem == (
        "mixture: 'natural': source 'a' has 100 of 3,784,179,787 windows, less than a 1,000,000th, the least weight; "
        "write the weights out"
    )
