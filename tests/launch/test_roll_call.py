"""The roll call on loopback, each process a thread: all that is wrong is said to all that came."""

import contextlib
import socket
import threading
import time

import pytest

from k2jax.errors import UserError
from k2jax.launch import roll_call
from k2jax.launch.roll_call import Caller, call, listen, split_address


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def roll(callers, address: str, seconds: float = 10, delays=None) -> tuple[dict, list[str]]:
    """{number of the thread: problems, or () for one that was let in}, and what was said."""
    ended, said = {}, []

    def one(number: int, caller: Caller) -> None:
        time.sleep((delays or {}).get(number, 0))
        try:
            (listen if caller.index == 0 else call)(address, caller, seconds, said.append)
            ended[number] = ()
        except UserError as error:
            ended[number] = error.problems

    threads = [threading.Thread(target=one, args=entry) for entry in enumerate(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended, said


def caller(index: int, count: int, host: str = "here") -> Caller:
    return Caller(index, count, host, 100 + index)


def test_all_are_let_in_whoever_comes_first():
    for delays in ({0: 0.5}, {1: 0.5, 2: 0.8}):
        ended, _ = roll([caller(i, 4) for i in range(4)], free_address(), delays=delays)
        assert ended == dict.fromkeys(range(4), ())


def test_sixty_four_processes():
    ended, _ = roll([caller(i, 64) for i in range(64)], free_address(), 30)
    assert ended == dict.fromkeys(range(64), ())


def test_those_that_are_missing_are_named_to_all(monkeypatch):
    monkeypatch.setattr(roll_call, "_NOTICE", 0.5)
    ended, said = roll([caller(i, 6) for i in (0, 1, 4)], free_address(), 1.5)
    text = "after 1.5 s these processes have not come: 2, 3, 5 (of 6)"
    assert len(ended) == 3 and all(problem.startswith(text) for (problem,) in ended.values())
    assert any(line.startswith("waiting for processes 2, 3, 5") for line in said)


def test_one_id_given_twice_and_another_count():
    ended, _ = roll([caller(0, 3), caller(1, 3, "a"), caller(1, 3, "b")], free_address(), 5)
    assert len(ended) == 3 and len({*ended.values()}) == 1
    assert ended[0][0].startswith("process id 1 was given twice: process 1 on ")
    assert "process 1 on a (pid 101)" in ended[0][0] and "process 1 on b (pid 101)" in ended[0][0]
    ended, _ = roll([caller(0, 2), caller(1, 4)], free_address(), 5)
    assert {*ended.values()} == {
        ("process 1 on here (pid 101): was told of 4 processes, process 0 of 2; give all the same number",)
    }


def failing(index: int, count: int, *failure: str) -> Caller:
    return Caller(index, count, "here", 100 + index, failure)


@pytest.mark.parametrize("number", [0, 2])
def test_what_one_failed_with_before_it_came_is_told_to_all(number):
    callers = [failing(i, 3, "a: 1", "b: 2") if i == number else caller(i, 3) for i in range(3)]
    started = time.monotonic()
    ended, _ = roll(callers, free_address(), 60)
    name = f"process {number} on here (pid {100 + number})"
    assert ended == dict.fromkeys(range(3), (f"{name}: a: 1", f"{name}: b: 2")) and time.monotonic() - started < 5


def test_those_that_failed_alike_are_named_in_one_line():
    ended, _ = roll([caller(0, 7), *(failing(i, 7, "a: 1") for i in range(1, 7))], free_address())
    (problem,) = ended[0]
    assert problem.startswith("process ") and problem.endswith(" and 2 more: a: 1") and problem.count("pid") == 4


def test_a_failure_of_any_length_is_told():
    problems = roll_call.told(1, ("x" * 100_000, *(f"field {i}" for i in range(30))))
    ended, _ = roll([caller(0, 2), failing(1, 2, *problems)], free_address())
    assert len(ended[0]) == 11 and "(the output of process 1 has it whole)" in ended[0][0] and "31 problems" in ended[0][10]


def test_one_that_was_restarted_comes_again():
    address = free_address()
    first = threading.Thread(target=listen, args=(address, caller(0, 3), 10, print))
    first.start()
    with contextlib.suppress(ConnectionRefusedError):
        for _ in range(50):
            time.sleep(0.05)
            with socket.create_connection(split_address(address)) as connection:
                connection.sendall(b'{"greeting": "k2jax roll call 2", "index": 1, "count": 3, "host": "x", "pid": 1}\n')
                connection.recv(1)
                break
    ended, _ = roll([caller(1, 3), caller(2, 3)], address)  # the first is answered from the thread above
    first.join()
    assert ended == {0: (), 1: ()}


def test_a_busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be opened here .*; give another port"):
            listen(address, caller(0, 2), 5, print)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None], ids=["web server", "closes", "silent"])
def test_another_program_at_the_address(monkeypatch, answer):
    monkeypatch.setattr(roll_call, "_SILENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        stop, kept = threading.Event(), []

        def serve():
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer is not None:
                        connection.recv(4096)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(UserError, match="another program answers there, or the run has begun without this"):
                call(f"127.0.0.1:{server.getsockname()[1]}", caller(1, 2), 20, print)
        finally:
            stop.set()
            thread.join()
            for connection in kept:
                connection.close()


def test_nobody_at_the_address():
    with pytest.raises(UserError, match="process 0 was not reached in 0.5 s .*; give the address of process 0"):
        call(free_address(), caller(1, 2), 0.5, print)


def test_noise_at_the_door_stops_nobody():
    address = free_address()
    first = threading.Thread(target=listen, args=(address, caller(0, 2), 10, print))
    first.start()
    for noise in (b"\xff\xfe\n", b"[]\n", b'{"greeting": "k2jax roll call 2"}\n', b'{"greeting": 3}\n', b"GET / HTTP/1.0\r\n\r\n"):
        for _ in range(40):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(split_address(address)) as connection:
                connection.sendall(noise)
                break
            time.sleep(0.05)
    assert roll([caller(1, 2)], address)[0] == {0: ()}
    first.join()


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:x", "host:８０"])
def test_addresses(address):
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        split_address(address)
    assert split_address("[::1]:80") == ("::1", 80) and split_address("a:80") == ("a", 80)
