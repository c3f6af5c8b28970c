"""The roll call: before jax.distributed connects them, the processes of a run tell the first one that they are there.

jax.distributed ends a late, doubled or miscounted process by SIGABRT, and names none of them. So the first process
listens at the coordinator's port, hears one line of JSON from each other one, and answers all of them alike: come in,
or everything that is wrong. Then the port is free for jax.distributed. A process that met a mistake of its own comes to
the roll call as well, with its failure, so that the others need not wait for it.
"""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from k2jax.errors import UserError, first_of
from k2jax.words import counted

_GREETING = "k2jax roll call 2"
_NOTICE = 30  # seconds between two lines about those that are missing
_GRACE = 10  # seconds in which late ones still hear what is wrong
_LINE = 2**20  # most bytes of a line
_LONGEST = 2000  # characters of a failure's problem that others hear
_SILENCE = 20  # seconds after which what listens there is taken for another program


@dataclass(frozen=True)
class Caller:
    """A process as it introduces itself.

    count: how many it was told there are. failure: why it will not take part, line by line; () if it will.
    """

    index: int
    count: int
    host: str
    pid: int
    failure: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"process {self.index} on {self.host} (pid {self.pid})"


def split_address(address: str) -> tuple[str, int]:
    """"HOST:PORT" or "[IPv6]:PORT" as (host, port). ValueError if it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError("must be HOST:PORT with a port of 1 to 65535")
    return host.strip("[]"), int(port)


def told(index: int, problems: tuple[str, ...]) -> tuple[str, ...]:
    """The problems of process `index` as the others hear them."""
    rest = f"... (the output of process {index} has it whole)"
    return tuple(first_of([text if len(text) <= _LONGEST else text[:_LONGEST] + rest for text in problems]))


def _failures(callers: list[Caller], most: int = 4) -> list[str]:
    """Failures of processes, those of all that failed alike in one line."""
    alike: dict[str, list[Caller]] = {}
    for caller in callers:
        for problem in caller.failure:
            alike.setdefault(problem, []).append(caller)
    problems = []
    for problem, failed in alike.items():
        rest = f" and {len(failed) - most} more" if len(failed) > most else ""
        problems.append(f"{', '.join(map(str, failed[:most]))}{rest}: {problem}")
    return problems


def _problems(callers: list[Caller], count: int) -> list[str]:
    """Failures of processes, numbers that they share, and counts that are not the first's."""
    problems = _failures(callers)
    for number in sorted({caller.index for caller in callers}):
        same = [caller for caller in callers if caller.index == number]
        if len(same) > 1:
            problems.append(f"process id {number} was given twice: {' and '.join(map(str, same))}; ids must be 0 to {count - 1}, each once")
    for caller in callers:
        if caller.count != count:
            problems.append(f"{caller}: was told of {counted(caller.count, 'process', 'processes')}, process 0 of {count}; give all the same number")
        elif not 0 <= caller.index < count:
            problems.append(f"{caller}: must have an id of 0 to {count - 1}")
    return problems


def _missing(present: set[int], count: int, most: int = 16) -> str:
    absent = [str(number) for number in range(count) if number not in present]
    return ", ".join(absent[:most]) + (f" and {len(absent) - most} more" if len(absent) > most else "")


def _line(values: dict) -> bytes:
    return json.dumps({"greeting": _GREETING} | values).encode() + b"\n"


def _hear(connection: socket.socket) -> Caller | None:
    """The caller at the other end; None if it is no process of ours."""
    try:
        connection.settimeout(5)
        with connection.makefile("rb") as file:
            value = json.loads(file.readline(_LINE))
        if value.pop("greeting") != _GREETING:
            return None
        caller = Caller(**value | {"failure": tuple(value.get("failure", ()))})
        texts, numbers = (caller.host, *caller.failure), (caller.index, caller.count, caller.pid)
        sound = all(type(v) is int for v in numbers) and all(isinstance(v, str) for v in texts)
        return caller if sound else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _tell(connection: socket.socket, values: dict) -> bool:
    """Send a line to the other end; False if it has gone, and will be missed."""
    try:
        connection.settimeout(5)
        connection.sendall(_line(values))
        return True
    except OSError:
        return False


def _is_gone(connection: socket.socket) -> bool:
    """True if the other end has closed: it waits in silence, so anything that can be read is its end."""
    try:
        connection.setblocking(False)
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _late(present: set[int], count: int, seconds: float) -> str:
    rule = "start them, or give a longer --join-timeout if they come late"
    return f"after {seconds:g} s these processes have not come: {_missing(present, count)} (of {count}); {rule}"


def _collect(server: socket.socket, me: Caller, deadline: float, seconds: float, say: Callable) -> tuple[list, list[str]]:
    """(connections of those that came, what is wrong) as soon as all are there, or something is wrong, or time is up."""
    waiting: list[tuple[socket.socket, Caller]] = []
    notice, told_by = time.monotonic() + _NOTICE, deadline if me.failure else None
    while True:
        for entry in [entry for entry in waiting if _is_gone(entry[0])]:  # one that is restarted comes again
            entry[0].close()
            waiting.remove(entry)
        callers = [me, *(caller for _, caller in waiting)]
        present = {caller.index for caller in callers}
        now = time.monotonic()
        if problems := _problems(callers, me.count):
            told_by = told_by or now + _GRACE  # those on their way are to hear it too
            if len(callers) >= me.count or now > told_by:
                return waiting, problems
        elif len(present) == me.count:
            return waiting, []
        elif now > deadline:
            return waiting, [_late(present, me.count, seconds)]
        if now > notice:
            say(f"waiting for processes {_missing(present, me.count)}, {deadline - now:.0f} s at most")
            notice += _NOTICE
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if (caller := _hear(connection)) is not None and _tell(connection, {}):
            waiting.append((connection, caller))
        else:
            connection.close()


def listen(address: str, me: Caller, seconds: float, say: Callable[[str], None]) -> None:
    """The first process's part. UserError with all that is wrong, the others told the same."""
    host, port = split_address(address)
    try:
        server = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        rule = "give another port, or end what listens there"
        raise UserError(f"--coordinator {address}: port {port} cannot be opened here ({error.strerror}); {rule}") from None
    with server:
        server.settimeout(0.5)
        waiting, problems = _collect(server, me, time.monotonic() + seconds, seconds, say)
    for connection, _ in waiting:
        with connection:
            _tell(connection, {"problems": problems})
    if problems:
        raise UserError(*problems)


def _read_answer(file) -> dict:
    """A line of the first process. ConnectionResetError if there is none, ValueError if it is not k2jax's."""
    if not (line := file.readline(2**20)):
        raise ConnectionResetError("it closed the connection")
    value = json.loads(line)
    if not isinstance(value, dict) or value.get("greeting") != _GREETING:
        raise ValueError("no greeting")
    return value


def _ask(address: str, me: Caller, seconds: float) -> list[str]:
    """All that is wrong, by the first process, as soon as it knows. OSError if it is not reached.

    Raises UserError if something else listens there.
    """
    with socket.create_connection(split_address(address), timeout=5) as connection, connection.makefile("rb") as file:
        connection.sendall(_line(asdict(me)))
        try:
            connection.settimeout(_SILENCE)
            _read_answer(file)  # at once: it is there
            connection.settimeout(seconds)
            return _read_answer(file)["problems"]
        except (TimeoutError, ValueError):
            raise _stranger(address) from None


def _stranger(address: str) -> UserError:
    rule = "give a free port, and each process id once"
    return UserError(f"--coordinator {address}: another program answers there, or the run has begun without this process; {rule}")


def call(address: str, me: Caller, seconds: float, say: Callable[[str], None]) -> None:
    """Every other process's part: find the first, introduce itself, wait for its word. UserError with all that is wrong."""
    started = time.monotonic()
    notice, closed_since = started + _NOTICE, None
    while True:
        try:
            # Some seconds more than the first process, so that its word, which names the missing, comes first.
            if problems := _ask(address, me, seconds + 10):
                raise UserError(*problems)
            return
        except OSError as error:
            why = error.strerror or str(error)
            # The first process closes when it ends, to be started again; what closes every time is something else.
            closed_since = (closed_since or time.monotonic()) if isinstance(error, ConnectionResetError) else None
        now = time.monotonic()
        if closed_since is not None and now > closed_since + _SILENCE:
            raise _stranger(address)
        if now > started + seconds:
            rule = "give the address of process 0 as the others reach it"
            raise UserError(f"--coordinator {address}: process 0 was not reached in {seconds:g} s ({why}); {rule}")
        if now > notice:
            say(f"waiting for process 0 at {address} ({why})")
            notice += _NOTICE
        time.sleep(0.2)
