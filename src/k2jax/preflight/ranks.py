"""Before a run of many processes begins: do they all run the same thing, and does each axis of the mesh carry data.

What differs between processes would not fail: it would hang in the first collective that not all of them reach, or
train on rows that nobody asked for.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import numpy as np

import k2jax
from k2jax.config import Config, flatten
from k2jax.errors import RunFailed, UserError
from k2jax.processes import barrier, count, gather
from k2jax.runs.mirror import mirror_of, shown

LIBRARIES = ("k2jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
WRITE_TEST = ".write-test-"  # begins the names of files that are in the run directory for a moment
_CLOCK_SECONDS = 5
_JAX_CONFIG = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


def _compiler_flags(text: str) -> list[str]:
    """Those that change the program: each process may dump its own to a folder of its own."""
    return sorted(flag for flag in text.split() if not flag.startswith("--xla_dump"))


def versions() -> dict[str, str]:
    """Python's and each library's version."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def code_digest() -> str:
    """16 hex digits of k2jax's own files: an edited checkout has the version of the one beside it."""
    root, digest = Path(k2jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _who(numbers: list[int], hosts: list[str]) -> str:
    named = [f"{number} ({hosts[number]})" for number in numbers[:4]] + (["..."] if len(numbers) > 4 else [])
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(named)}"


def differences(facts: list[dict], hosts: list[str]) -> Iterator[str]:
    """Every fact that is not the same in all processes, with its values and who has which, the most frequent first."""
    for name in dict.fromkeys(name for entry in facts for name in entry):
        values: dict[str, list[int]] = {}
        for number, entry in enumerate(facts):
            values.setdefault(repr(entry.get(name)), []).append(number)
        if len(values) > 1:
            parts = sorted(values.items(), key=lambda item: -len(item[1]))
            yield f"{name}: must be the same in all processes; " + "; ".join(f"{v} in {_who(n, hosts)}" for v, n in parts)


def _clocks(times: list[float], hosts: list[str]) -> Iterator[str]:
    middle = sorted(times)[len(times) // 2]
    for number, at in enumerate(times):
        if abs(at - middle) > _CLOCK_SECONDS:
            rule = f"must be within {_CLOCK_SECONDS} s, or logs and leases mislead; synchronise it (chrony, ntpd)"
            yield f"clock of {_who([number], hosts)}: {at - middle:+.0f} s from the others; {rule}"


def check_agreement(config: Config) -> None:
    """Raise UserError, in all processes, if they differ in config, versions, code or devices, or in the time of day."""
    if count() == 1:
        return
    local = jax.local_devices()
    facts = {f"config {name}": value for name, value in flatten(asdict(config)).items()}
    facts |= {f"version of {name}": version for name, version in versions().items()}
    facts |= {"code of k2jax (digest)": code_digest(), "devices": f"{len(local)} x {local[0].device_kind}"}
    facts |= {f"jax.config {name}": getattr(jax.config, name) for name in _JAX_CONFIG}
    facts |= {name: _compiler_flags(os.environ.get(name, "")) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    barrier("clock")  # from here all read their clocks at the same time
    entries = gather("agreement", {"host": socket.gethostname(), "time": time.time(), "facts": facts})
    hosts = [entry["host"] for entry in entries]
    problems = [*differences([entry["facts"] for entry in entries], hosts), *_clocks([e["time"] for e in entries], hosts)]
    if problems:
        raise UserError(*problems)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[tuple[str | None, str | None]]:
    """(name of a file of this process, in `folder` while inside, what keeps one from there); one of them None."""
    mirror = mirror_of(folder)
    with contextlib.ExitStack() as stack:
        try:
            if mirror is None:
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=WRITE_TEST))
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
                found = Path(file.name).name, None
            else:
                found = f"{WRITE_TEST}{secrets.token_hex(8)}", None
                mirror.bucket.write(found[0], "x")
                stack.callback(mirror.bucket.delete, found[0])
        except OSError as error:
            found = None, f"cannot be written: {error.strerror}"
        except UserError as error:  # of a bucket
            found = None, str(error)
        yield found


def _is_there(folder: Path, name: str) -> bool:
    mirror = mirror_of(folder)
    return os.path.lexists(folder / name) if mirror is None else mirror.bucket.has(name)


def check_storage(folder: Path, digests: dict[str, str], state_bytes: int) -> None:
    """Raise UserError, in all processes, if one cannot write to the run directory, or if they read different stores.

    Also if they have no run directory in common: each would save its part where the others' are not. digests: of what
    they read. state_bytes: of one checkpoint, for which there must be room; in a bucket there is.
    """
    if count() == 1:
        return
    in_bucket = mirror_of(folder) is not None
    with _written(folder) as (name, problem):
        free = None if problem or in_bucket else shutil.disk_usage(folder).free
        own = {"host": socket.gethostname(), "name": name, "problem": problem, "free": free, "digests": digests}
        entries = gather("storage", own)
        first = entries[0]["name"]  # new, so that no file system answers from memory
        seen = gather("shared", first is None or _is_there(folder, first))
    barrier("tidied")  # the first that raises ends the others, whose files would stay
    hosts = [entry["host"] for entry in entries]
    problems = [*differences([entry["digests"] for entry in entries], hosts)]
    shared = "it must be one directory that all processes share"
    for number, entry in enumerate(entries):
        where = f"train.run_dir = {shown(folder)!r}, {_who([number], hosts)}"
        if entry["problem"]:
            problems.append(f"{where}: {entry['problem']}; {shared}")
        elif not seen[number]:
            problems.append(f"{where}: is another directory than that of process 0 ({hosts[0]}); {shared}")
        elif entry["free"] is not None and entry["free"] < state_bytes:
            rule = f"a checkpoint takes {state_bytes:,}; make room, or give another"
            problems.append(f"{where}: {entry['free']:,} bytes are free, {rule}")
    if problems:
        raise UserError(*problems)


@partial(jax.jit, static_argnames=("mesh", "axis"))
def _sum_over(values: jax.Array, mesh: jax.sharding.Mesh, axis: str) -> jax.Array:
    spec = jax.P(mesh.axis_names)
    return jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(values)


def check_axes(mesh: jax.sharding.Mesh) -> str:
    """One line with the time of a small sum over each axis of the mesh; in all processes at once, with `mesh` set.

    Raises RunFailed if a sum is wrong.
    """
    numbers = np.arange(mesh.size, dtype=np.float32).reshape(mesh.devices.shape)
    sharding, said = jax.NamedSharding(mesh, jax.P(mesh.axis_names)), []
    values = jax.make_array_from_callback((mesh.size,), sharding, lambda index: numbers.ravel()[index])
    for dim, axis in enumerate(mesh.axis_names):
        if mesh.shape[axis] == 1:
            continue
        barrier("axis")
        jax.block_until_ready(_sum_over(values, mesh, axis))  # the first makes the connections
        started = time.monotonic()
        sums = jax.block_until_ready(_sum_over(values, mesh, axis))
        milliseconds = 1000 * (time.monotonic() - started)
        expected = np.broadcast_to(numbers.sum(dim, keepdims=True), numbers.shape).ravel()
        for shard in sums.addressable_shards:
            if not np.array_equal(np.asarray(shard.data), expected[shard.index]):
                raise RunFailed(f"a sum over mesh.{axis} is wrong on {shard.device}: {shard.data} for {expected[shard.index]}")
        said.append(f"{axis} {mesh.shape[axis]}: {milliseconds:.1f} ms")
    return f"sums over the mesh's axes: {', '.join(said)}"
