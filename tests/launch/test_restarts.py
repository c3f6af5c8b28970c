"""Starting again: after which ends, and how often."""

from k2jax.launch.restarts import Restarts


def test_what_somebody_wanted_is_left_so():
    restarts = Restarts(3)
    for code in (2, 130, 143):
        assert restarts.after(code, 8)[0] is False
    assert restarts.after(2, 8)[1] == "there is something to correct, named above"


def test_without_progress_the_budget_ends():
    restarts = Restarts(2)
    assert restarts.after(1, -1) == (True, "no step is committed; restart 1 of 2 without a newer one")
    assert restarts.after(124, -1) == (True, "no step is committed; restart 2 of 2 without a newer one")
    assert restarts.after(137, -1) == (False, "no step is committed, after 2 restarts in a row without a newer one")


def test_progress_fills_the_budget():
    restarts = Restarts(2)
    ends = [(137, 4), (137, 4), (137, 8), (137, 8), (137, 8)]
    assert [restarts.after(code, step)[0] for code, step in ends] == [True, True, True, True, False]
    assert restarts.after(137, 4)[0] is False  # an older step is no progress


def test_none_are_given():
    assert Restarts(0).after(1, 4) == (False, "step 4 is committed, --max-restarts is 0")
