"""Signals to a run without a model, alone and of several processes: what is said at once, and what ends."""

import re
import sys
from pathlib import Path

import many
import pytest

TOY = Path(__file__).parents[1] / "toy_process.py"
pytestmark = pytest.mark.slow


def together(folder: Path, count: int, work: str) -> many.Ended:
    address = f"127.0.0.1:{many.free_port()}"
    numbers = range(max(count, 1))
    return many.run(folder, [[sys.executable, str(TOY), address, str(count), str(i), work] for i in numbers], 120)


def test_all_stop_after_the_same_step_and_the_first_says_so_at_once(tmp_path):
    """SIGTERM again, as schedulers repeat it, changes nothing."""
    ended = together(tmp_path, 3, "one_is_told_to_stop")
    assert ended.codes == [0, 0, 0], ended
    (step,) = {re.search(r"ended after (\d+), 15", text)[1] for text in ended.outputs}
    line = f"stopping after step {step}, then saving; a second Ctrl-C ends at once, without a save\n"
    assert int(step) > 20 and line in ended.outputs[0] and "stopping" not in "".join(ended.outputs[1:])


@pytest.mark.parametrize("count", [0, 3])
def test_a_second_ctrl_c_ends_at_once_whatever_the_main_thread_does(tmp_path, count):
    """Not one that comes at once: a terminal and what started the process may both send the first."""
    ended = together(tmp_path, count, "one_is_interrupted_twice")
    assert ended.codes == [130] * max(count, 1) and ended.seconds < 5, ended
    own = ended.outputs[1 if count else 0]
    assert own.index("stopping before the first step, then saving") < own.index("SIGINT again: ended at once, without")
    assert "stopping before the first step" in ended.outputs[0]
    assert all("process 1 failed: SIGINT again" in ended.outputs[i] for i in range(count) if i != 1)


def test_a_signal_before_the_run_has_begun_ends_all_at_once(tmp_path):
    """While they wait for one that opens its data, say; one that was just killed would be missed for half a minute."""
    ended = together(tmp_path, 2, "one_is_stopped_before_it_begins")
    assert ended.codes == [143, 143] and ended.seconds < 5, ended
    assert "process 1 failed: SIGTERM before the run had begun" in ended.outputs[0]
