"""Joining the other processes of a run, and this process's devices; both before jax first looks for devices.

The processes come from the command line, from K2JAX_* variables, or from the cluster that started them.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from k2jax import processes
from k2jax.errors import UserError
from k2jax.launch.roll_call import Caller, call, listen, split_address, told
from k2jax.words import counted

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "K2JAX_COORDINATOR", "K2JAX_NUM_PROCESSES", "K2JAX_PROCESS_ID"
SIMULATE = "K2JAX_SIMULATE"  # CPU devices of a process, as --simulate of its command
JOIN_SECONDS = 600  # of a cold start: machines that boot, images that load
_DECLINE_SECONDS = 60  # in which the others come to hear that a process will not join
_LOOPBACK_SECONDS = 30  # a coordinator on this machine alone needs no machine to boot
_HEARTBEAT_SECONDS = 30  # of silence until a process is given up; a garbage collector's or a disk's stall is shorter
_SHUTDOWN_SECONDS = 120
PORT = 61_412  # where a cluster names hosts and no port
_BY_HAND = "give --coordinator, --num-processes and --process-id"


def use_cpu_devices(count: int | str) -> None:
    """Make this process see `count` CPU devices and nothing else; must come before the first use of jax's devices.

    Raises UserError for a count below 1.
    """
    if not str(count).isascii() or not str(count).isdigit() or int(count) < 1:
        raise UserError(f"--simulate {count}: must be at least 1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(count))


@dataclass(frozen=True)
class Membership:
    """This process's part in a run. found: how it was told, for the user."""

    coordinator: str
    num_processes: int
    process_id: int
    found: str
    local_device_ids: tuple[int, ...] | None = None  # of several processes on one host each has its own


def _port_of_job(number: str) -> int:
    """Two jobs on one machine have two."""
    return 61_440 + int(number) % 4096


def _slurm(environ: Mapping[str, str]) -> Membership | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")  # srun's; a batch shell has not all
    if not all(name in environ for name in names):
        return None
    first = environ["SLURM_STEP_NODELIST"].split(",")[0]  # host, host[03, host[03-07,09], host[1-4]
    prefix, _, numbers = first.partition("[")
    host = prefix + numbers.split("-")[0].rstrip("]")
    port = _port_of_job(environ["SLURM_JOB_ID"])
    together = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]  # such as 8(x2)
    own = (int(environ["SLURM_LOCALID"]),) if int(together) > 1 else None
    return Membership(f"{host}:{port}", int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"]), "Slurm (srun)", own)


def _open_mpi(environ: Mapping[str, str]) -> Membership | None:
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    count, number = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_RANK"])
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # JOB;tcp://ADDRESS[,ADDRESS]:PORT; Open MPI 5 has none
    job, _, rest = uri.partition(".0;tcp://")
    if rest:
        host = rest.replace("[", "").replace("]", "").split(",")[0].rsplit(":", 1)[0]
        several = int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) > 1
        own = (int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),) if several else None
        return Membership(f"{host}:{_port_of_job(job)}", count, number, "Open MPI (mpirun)", own)
    if count > 1:
        rule = f"give process 0's address to all: mpirun -x {COORDINATOR}=HOST:PORT"
        raise UserError(f"Open MPI {environ.get('OMPI_VERSION', '5')} does not name the first process's host; {rule}")
    return None


def _sky_pilot(environ: Mapping[str, str]) -> Membership | None:
    if "SKYPILOT_NODE_RANK" not in environ:
        return None
    hosts = environ["SKYPILOT_NODE_IPS"].split()
    return Membership(f"{hosts[0]}:{PORT}", len(hosts), int(environ["SKYPILOT_NODE_RANK"]), "SkyPilot")


def _torchrun(environ: Mapping[str, str]) -> Membership | None:
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    if not all(name in environ for name in names):
        return None
    address, port, number, count = (environ[name] for name in names)
    # The port itself is taken by torchrun's own store.
    return Membership(f"{address}:{int(port) + 1}", int(count), int(number), "MASTER_ADDR and RANK")


def _cloud_tpu(environ: Mapping[str, str]) -> Membership | None:
    """TPU pods, of which jax knows more than the environment says: it asks the machine's metadata server."""
    if not any(name in environ for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "TPU_NAME")):
        return None
    from jax._src.clusters import ClusterEnv  # no public way to see what it finds before it connects

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    except Exception as error:
        raise UserError(f"a TPU pod that cannot be asked for its hosts ({type(error).__name__}: {error}); {_BY_HAND}") from None
    return None if None in found[:3] else Membership(*found[:3], "TPU pod")


def _kubernetes(environ: Mapping[str, str]) -> Membership | None:
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    rule = f"set {COORDINATOR} and {NUM_PROCESSES} in the Job, as `k2jax launch jobset` does, or {NUM_PROCESSES}=1 for one pod"
    raise UserError(f"an Indexed Job of Kubernetes (JOB_COMPLETION_INDEX): says neither address nor number of its pods; {rule}")


_CLUSTERS = (_open_mpi, _slurm, _sky_pilot, _cloud_tpu, _torchrun, _kubernetes)


def _asked(options: Mapping[str, object], environ: Mapping[str, str]) -> Membership | None:
    """The part that the command line and the K2JAX_* variables give; UserError with all that is wrong with it."""
    names = {COORDINATOR: "--coordinator", NUM_PROCESSES: "--num-processes", PROCESS_ID: "--process-id"}
    given = {name: (option, options.get(name)) for name, option in names.items() if options.get(name) is not None}
    given = {name: (name, environ[name]) for name in names if environ.get(name)} | given
    if PROCESS_ID not in given and "JOB_COMPLETION_INDEX" in environ and given:
        given[PROCESS_ID] = "JOB_COMPLETION_INDEX", environ["JOB_COMPLETION_INDEX"]
    if not given or {NUM_PROCESSES} == {*given} and str(given[NUM_PROCESSES][1]) == "1":
        return None
    problems = [f"{option}: is missing, or {name}; {', '.join(v[0] for v in given.values())} need it" for name, option in names.items() if name not in given]
    numbers = {}
    for name in (NUM_PROCESSES, PROCESS_ID):
        if name in given:
            shown, value = given[name]
            if str(value).isascii() and str(value).isdigit() and (name == PROCESS_ID or int(value) > 0):
                numbers[name] = int(value)
            else:
                problems.append(f"{shown} {value!r}: must be a number from {0 if name == PROCESS_ID else 1}")
    if len(numbers) == 2 and numbers[PROCESS_ID] >= numbers[NUM_PROCESSES]:
        count = numbers[NUM_PROCESSES]
        problems.append(f"{given[PROCESS_ID][0]} {numbers[PROCESS_ID]}: must be 0 to {count - 1}, of {counted(count, 'process', 'processes')}")
    if COORDINATOR in given:
        shown, value = given[COORDINATOR]
        try:
            split_address(str(value))
        except ValueError as error:
            problems.append(f"{shown} {value!r}: {error}")
    if problems:
        raise UserError(*problems)
    sources = " and ".join(dict.fromkeys("K2JAX_*" if v[0].startswith("K2JAX_") else v[0] for v in given.values()))
    return Membership(str(given[COORDINATOR][1]), numbers[NUM_PROCESSES], numbers[PROCESS_ID], sources)


def membership(options: Mapping[str, object], environ: Mapping[str, str]) -> Membership | None:
    """This process's part in a run, by `options` (K2JAX_* names), variables of these names, or its cluster.

    None if it is alone. UserError with all that is wrong or missing.
    """
    if (asked := _asked(options, environ)) is not None or str(options.get(NUM_PROCESSES) or environ.get(NUM_PROCESSES)) == "1":
        return asked
    for cluster in _CLUSTERS:
        try:
            found = cluster(environ)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(f"{cluster.__name__[1:]}: variables that do not fit together ({error!r}); {_BY_HAND}") from None
        if found is not None:
            return found if found.num_processes > 1 else None
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _call_roll(part: Membership, seconds: float, say: Callable[[str], None], failure: tuple[str, ...] = ()) -> None:
    me = Caller(part.process_id, part.num_processes, socket.gethostname(), os.getpid(), failure)
    loopback = _is_loopback(split_address(part.coordinator)[0])
    seconds = min(seconds, _LOOPBACK_SECONDS) if loopback else seconds
    try:
        (listen if me.index == 0 else call)(part.coordinator, me, seconds, say)
    except UserError as error:
        hint = f"{part.coordinator} is this machine ({me.host}) alone: with other machines, give the address of process 0's"
        raise UserError(*error.problems, *([hint] if loopback else [])) from None


class NotComing(UserError):
    """A process that cannot join the others of its run: the problems are to be shown to its user first, then to them by `decline`."""

    def __init__(self, part: Membership, seconds: float, *problems: str):
        super().__init__(*problems)
        self.part, self.seconds = part, seconds


@contextlib.contextmanager
def before_joining(options: Mapping[str, object], environ: Mapping[str, str], seconds: float) -> Iterator[None]:
    """A UserError inside becomes NotComing if there are others. Arguments: as of `join`, which comes later."""
    try:
        yield
    except UserError as error:
        try:
            part = membership(options, environ)
        except UserError as another:
            raise UserError(*error.problems, *another.problems) from None
        if part is None or part.num_processes == 1:
            raise
        raise NotComing(part, seconds, *error.problems) from None


def decline(error: NotComing, say: Callable[[str], None]) -> None:
    """Tell the other processes why this one does not join them: they end with the same. Returns when they know.

    Those that come later than in a minute hear nothing.
    """
    seconds = min(error.seconds, _DECLINE_SECONDS)
    say(f"process {error.part.process_id} of {error.part.num_processes}: tells the others, {seconds:g} s at most")
    with contextlib.suppress(UserError):  # this process's own problems, with those of others
        _call_roll(error.part, seconds, say, told(error.part.process_id, error.problems))


def join(
    options: Mapping[str, object],
    environ: Mapping[str, str],
    say: Callable[[str], None],
    seconds: float = JOIN_SECONDS,
) -> None:
    """Connect this process with the others of its run, if it has any; before jax first looks for devices.

    seconds: patience with those that are not there yet.
    Raises UserError, in every process that came, with those that are missing, doubled or miscounted.
    """
    part = membership(options, environ)
    if part is None:
        return
    say(f"process {part.process_id} of {part.num_processes}, coordinator {part.coordinator}, by {part.found}")
    if part.num_processes > 1:
        _call_roll(part, seconds, say)
    import jax
    from jax._src import distributed

    from k2jax.sharding.gloo import sum_after_all_to_all

    # Its handler of SIGTERM would take the place of Python's, and says nothing: processes.stop_is_due stands for it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            part.coordinator,
            part.num_processes,
            part.process_id,
            part.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=60,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:
        raise UserError(f"jax.distributed at {part.coordinator}: {error}") from None
    sum_after_all_to_all()
    processes.joined(distributed.global_state.client, part.process_id, part.num_processes)
