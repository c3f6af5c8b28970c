"""`k2jax launch local`: its supervisor with small scripts as ranks, in a process of its own where that must die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2jax.errors import UserError
from k2jax.launch.local import free_port, rank_environments, supervise

SOURCE = str(Path(__file__).parents[2] / "src")
RANK = "import os, signal, sys, time\nI = int(os.environ['K2JAX_PROCESS_ID'])\n"
LAUNCHER = """
import json, os, sys
from k2jax.launch.local import rank_environments, supervise
script, count, grace = json.loads(sys.argv[1])
try:
    sys.exit(supervise([sys.executable, "-c", script], rank_environments(count, None), grace=grace).code)
except BrokenPipeError:
    os._exit(42)  # or Python would try to write what is left
"""


def run(script: str, count: int, grace: float = 5, log_dir: Path | None = None) -> int:
    return supervise([sys.executable, "-c", RANK + script], rank_environments(count, None), log_dir, grace).code


@pytest.fixture(autouse=True)
def default_signals():
    """A shell that starts the tests in the background has them ignore signals, and so all that they start."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(n, handler) for n, handler in zip(numbers, (signal.default_int_handler, signal.SIG_DFL))]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def launcher(script: str, count: int, grace: float = 5, **options) -> subprocess.Popen:
    """A launcher in a process of its own."""
    argv = [sys.executable, "-c", LAUNCHER, json.dumps([RANK + script, count, grace])]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def pids_of(output, count: int) -> list[int]:
    """The pids that the ranks print first; IndexError if they end without."""
    return [int(output.readline().split()[1]) for _ in range(count)]


def is_alive(pid: int) -> bool:
    """A zombie, which waits for an init that never asks for it in some containers, is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int], seconds: float) -> None:
    until = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def test_what_each_rank_is_told(capfdbinary):
    names = ("K2JAX_COORDINATOR", "K2JAX_NUM_PROCESSES", "K2JAX_PROCESS_ID", "K2JAX_SIMULATE")
    script = f"import json, os\nprint(json.dumps([os.environ.get(name) for name in {names}]))"
    assert supervise([sys.executable, "-c", script], rank_environments(3, 2)).code == 0
    lines = sorted(capfdbinary.readouterr().out.splitlines())
    assert [line[:4] for line in lines] == [b"[0] ", b"[1] ", b"[2] "]
    told = [json.loads(line[4:]) for line in lines]
    assert [(count, index, devices) for _, count, index, devices in told] == [("3", str(i), "2") for i in range(3)]
    [address] = {address for address, *_ in told}
    assert address.startswith("127.0.0.1:") and 1023 < int(address.removeprefix("127.0.0.1:")) < 65536
    assert "K2JAX_SIMULATE" not in rank_environments(1, None)[0]


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_sixteen_ranks_interleave_by_whole_lines(capfdbinary):
    # Each line is written in two pieces, so that readers that take what is there would mix them.
    script = "for n in range(50):\n    os.write(1, b'x' * 300 + b' ')\n    os.write(1 + n % 2, b'%d %d\\n' % (I, n))"
    assert run(script, 16) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert len(lines) == 16 * 50
    for index in range(16):
        prefix = b"[%d] " % index
        mine = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        assert mine == [b"x" * 300 + b" %d %d" % (index, n) for n in range(50)]


def test_last_line_without_end_and_bytes_that_are_no_text(capfdbinary, tmp_path):
    written = b"\xff\x00\r\x1b[2J \xe2\x82\nlast"
    assert run(f"os.write(1, {written!r})", 1, log_dir=tmp_path / "logs" / "deep") == 0
    assert capfdbinary.readouterr().out == b"[0] \xff\x00\r\x1b[2J \xe2\x82\n[0] last\n"
    assert (tmp_path / "logs" / "deep" / "rank-0.log").read_bytes() == written


def test_a_line_without_end_is_shown_in_pieces(capfdbinary):
    assert run("os.write(1, b'a' * 2_500_000)", 1) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [4 + 2**20, 4 + 2**20, 4 + 2_500_000 - 2 * 2**20]


def test_gloo_noise_goes_to_the_log_alone(capfdbinary, tmp_path):
    noise = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    assert run(f"print({noise!r})\nprint('[Gloo] something else')", 1, log_dir=tmp_path) == 0
    assert capfdbinary.readouterr().out == b"[0] [Gloo] something else\n"
    assert (tmp_path / "rank-0.log").read_text().splitlines()[0] == noise


def test_logs_of_a_resumed_run_go_on(capfdbinary, tmp_path):
    for _ in range(2):
        assert run("print('from', I)", 2, log_dir=tmp_path) == 0
    assert (tmp_path / "rank-1.log").read_text() == "from 1\n" * 2


def test_the_first_failure_counts_and_its_last_lines_are_repeated(capfdbinary):
    # Rank 1 fails; the others end by themselves a little later, as the failure's store makes them, with other codes.
    script = """
for n in range(30): print('line', n)
if I == 1: sys.exit(3)
time.sleep(0.5)
sys.exit(9)
"""
    assert run(script, 4, grace=20) == 3
    words = capfdbinary.readouterr().err.decode().splitlines()
    assert words[0].startswith("k2jax launch: process 1 failed first, with exit code 3 after ")
    assert words[1:] == [f"[1] line {n}" for n in range(10, 30)]


def test_a_rank_killed_by_a_signal(capfdbinary):
    began = time.monotonic()
    assert run("if I == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 3, grace=0.5) == 137
    assert time.monotonic() - began < 20
    assert "process 2 failed first, with exit code 137 (SIGKILL) after" in capfdbinary.readouterr().err.decode()


def test_grace_then_sigterm_then_sigkill(capfdbinary):
    """Rank 0 answers SIGTERM; rank 1 ignores it, and what it started too."""
    script = """
if I == 2:
    time.sleep(1)
    sys.exit(5)
if I == 0:
    signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(0)))
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.write(1, b'child %d\\n' % os.getpid())
time.sleep(60)
"""
    began = time.monotonic()
    assert run(script, 3, grace=1) == 5
    assert 3 <= time.monotonic() - began < 25
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert "[0] told" in lines
    wait_until_dead([int(line.split()[2]) for line in lines if line.startswith("[1] child")], 5)


def test_a_rank_that_ends_well_ends_no_other(capfdbinary):
    assert run("time.sleep(2 * I)\nprint('done')", 2, grace=0.1) == 0
    assert capfdbinary.readouterr().out == b"[0] done\n[1] done\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_as_sigterm(number):
    script = """
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with launcher(script, 3) as process:
        pids = pids_of(process.stdout, 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved", "[2] saved"]
    assert "failed" not in err and number.name in err
    wait_until_dead(pids, 1)


def test_a_run_that_ends_well_in_spite_of_a_signal_is_done():
    with launcher(
        "signal.signal(15, lambda *_: sys.exit(0))\nprint(os.getpid(), flush=True)\ntime.sleep(60)", 2
    ) as process:
        pids_of(process.stdout, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize(("ignored", "code"), [("signal.SIGINT, signal.SIG_IGN", 137), ("signal.SIGINT, signal.SIG_DFL", 130)])
def test_the_second_signal_ends_what_ignores_the_first(ignored, code):
    """By SIGINT, at which a trainer ends without a save; and if that is ignored too by SIGKILL."""
    script = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal({ignored})\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with launcher(script, 2, grace=1) as process:
        pids = pids_of(process.stdout, 2)
        process.send_signal(signal.SIGINT)
        assert "SIGINT: SIGTERM to all" in process.stderr.readline()
        time.sleep(2)
        assert process.poll() is None  # the first alone has no deadline: a save may take minutes
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == code
    wait_until_dead(pids, 1)


def test_ctrl_c_in_a_terminal_reaches_no_rank_but_through_the_launcher():
    script = """
signal.signal(signal.SIGINT, lambda *_: os._exit(77))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with launcher(script, 2, start_new_session=True) as process:
        pids_of(process.stdout, 2)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_ranks_do_not_outlive_a_killed_launcher():
    """One answers SIGTERM, one ignores it and has a child, one is stopped."""
    script = """
if I == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
os.write(1, b'%d\\n' % os.getpid())  # at once: two processes share this pipe
if I == 2: os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
    with launcher(script, 3, grace=1) as process:
        pids = pids_of(process.stdout, 4)
        assert all(is_alive(pid) for pid in pids)
        process.kill()
        process.wait()
    wait_until_dead(pids, 15)


def test_a_killed_launcher_lets_ranks_save(tmp_path):
    script = f"""
def save(*_):
    time.sleep(1)
    open({str(tmp_path)!r} + f'/saved-{{I}}', 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with launcher(script, 2, grace=10) as process:
        pids = pids_of(process.stdout, 2)
        process.kill()
    wait_until_dead(pids, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved-0", "saved-1"]


def test_nobody_reads_any_more():
    """`k2jax launch local ... | head -1`: the ranks end, though they write without end and catch SIGTERM."""
    script = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nwhile True: print(os.getpid(), flush=True)"
    process = launcher(script, 2, grace=2)
    pids = pids_of(process.stdout, 1)
    process.stdout.close()
    assert process.wait(timeout=30) == 42
    process.stderr.close()
    wait_until_dead(pids, 1)


def test_a_log_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--log-dir .*file/logs: cannot be written \(Not a directory"):
        run("print('never')", 2, log_dir=tmp_path / "file" / "logs")


def test_a_full_disk_under_the_logs(monkeypatch):
    """Linux's /dev/full stands in for it; the rank is ended, the launcher says why."""
    monkeypatch.setattr("k2jax.launch.local._open_logs", lambda *_: [open("/dev/full", "wb", buffering=0)])
    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        run("print('a line', flush=True)\ntime.sleep(60)", 1, grace=1)
    assert time.monotonic() - began < 20
