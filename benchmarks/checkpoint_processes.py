"""A checkpoint by many processes: bytes written, host memory of a save and of a restore, what the digests cost.

    python benchmarks/checkpoint_processes.py [--processes 4] [--devices 2] [--mib 512]

Real processes on this machine; the state is made of random bits, which do not compress. Damage is tried last: bits of
the files are flipped one at a time, and every one must be found, with the name of its file.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from measure import Peak

from k2jax.train.state import TrainState

NUM_WEIGHTS = 8  # as large as each other; there is a momentum of each


def shapes(mesh: jax.sharding.Mesh, mib: int, cut: jax.P) -> TrainState:
    """A state of so many MiB, its arrays cut as said."""

    def array(shape, dtype=jnp.float32, spec=jax.P()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    size = (4, 8, mib * 2**20 // 4 // (2 * NUM_WEIGHTS) // 32 // 256, 256)
    weights, momenta = ({str(i): array(size, spec=cut) for i in range(NUM_WEIGHTS)} for _ in range(2))
    return TrainState(array((), jnp.int32), weights, {}, momenta, {"norm": array((64,))})


def random_state(abstract: TrainState) -> TrainState:
    """Arrays of random bits that are finite numbers."""

    def init():
        keys = iter(jax.random.split(jax.random.key(0), 2 * NUM_WEIGHTS))

        def weight(shape):
            bits = jax.random.bits(next(keys), shape.shape)
            return jax.lax.bitcast_convert_type((bits >> 2) | jnp.uint32(1 << 28), jnp.float32)

        weights, momenta = jax.tree.map(weight, (abstract.params, abstract.opt_state))
        return TrainState(jnp.int32(0), weights, {}, momenta, {"norm": jnp.zeros(64)})

    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.block_until_ready(jax.jit(jax.sharding.auto_axes(init, out_sharding=layout))())


def worker(folder: Path, mib: int) -> None:
    """One process: makes its part of a state, saves it, restores it on another mesh, and prints the figures."""
    from k2jax import processes
    from k2jax.cli.run import join_processes
    from k2jax.config import CheckpointConfig
    from k2jax.sharding.mesh import mesh_of
    from k2jax.train.checkpoint import Saver, parts, restore_state
    from k2jax.train.content import content_sums

    options = argparse.Namespace(simulate=None, coordinator=None, num_processes=None, process_id=None, join_timeout=60)
    join_processes(options)
    count = len(jax.devices())
    first, second = mesh_of(fsdp=count), mesh_of(expert=count)
    with jax.set_mesh(first):
        state = random_state(shapes(first, mib, jax.P(None, None, "fsdp")))
        local = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
        jax.block_until_ready(content_sums(parts(state)))
        started = time.monotonic()
        for _ in range(3):
            jax.block_until_ready(content_sums(parts(state)))
        digest = (time.monotonic() - started) / 3
        saver = Saver(folder / "checkpoints", CheckpointConfig())
        processes.barrier("ready")
        with Peak() as save:
            started = time.monotonic()
            saver.save(1, state, {})
            blocked = time.monotonic() - started
            saver.wait()
            saved = time.monotonic() - started
        jax.tree.map(lambda x: x.delete(), state)
    with jax.set_mesh(second):
        processes.barrier("saved")
        with Peak() as restore:
            started = time.monotonic()
            jax.block_until_ready(restore_state(folder / "checkpoints", 1, shapes(second, mib, jax.P(None, "expert"))))
            restored = time.monotonic() - started
    print(json.dumps({"local": local, "digest": digest, "blocked": blocked, "saved": saved, "save": save.more,
                      "restored": restored, "restore": restore.more}))  # fmt: skip
    processes.leave()


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def flips(folder: Path, tries: int) -> int:
    """The number of single flipped bits, of so many, that are found and named."""
    from k2jax.runs.commits import damage

    files = [path for path in (folder / "checkpoints" / "1").rglob("*") if path.is_file() and path.stat().st_size]
    rng, found = random.Random(1), 0
    for _ in range(tries):
        (path,) = rng.choices(files, [path.stat().st_size for path in files] if rng.random() < 0.5 else None)
        where = path, rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        flip(*where)
        found += damage(folder / "checkpoints", 1) == [f"{path}: is not what was written (sha256)"]
        flip(*where)
    assert damage(folder / "checkpoints", 1) == []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--mib", type=int, default=512, help="size of the whole state")
    parser.add_argument("--flips", type=int, default=200, help="flipped bits to be found, of a state of 8 MiB")
    parser.add_argument("--worker", metavar="FOLDER")
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker), args.mib)
        return
    for mib in (args.mib, 8):
        with tempfile.TemporaryDirectory() as folder:
            with socket.create_server(("127.0.0.1", 0)) as server:
                address = f"127.0.0.1:{server.getsockname()[1]}"
            environment = os.environ | {"K2JAX_COORDINATOR": address, "K2JAX_NUM_PROCESSES": str(args.processes),
                                        "K2JAX_SIMULATE": str(args.devices)}  # fmt: skip
            command = [sys.executable, __file__, "--worker", folder, "--mib", str(mib)]
            workers = [
                subprocess.Popen(command, env=environment | {"K2JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
                for i in range(args.processes)
            ]
            figures = [json.loads(w.communicate()[0].splitlines()[-1]) for w in workers]
            step = Path(folder, "checkpoints", "1")
            written = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
            if mib == args.mib:
                report(figures, written, args)
            else:
                print(f"flipped bits found and named: {flips(Path(folder), args.flips)} of {args.flips}")


def report(figures: list[dict], written: int, args) -> None:
    total, worst = sum(f["local"] for f in figures), {name: max(f[name] for f in figures) for name in figures[0]}
    print(f"{args.processes} processes of {args.devices} devices, a state of {total / 2**20:.0f} MiB, {total / args.processes / 2**20:.0f} each")
    print(f"bytes written: {written / total:.4f} of one copy of the state")
    print(f"save: {worst['saved']:.2f} s, of which training waits {worst['blocked']:.2f} s")
    print(f"host memory of a save, beside the state: {max(f['save'] / f['local'] for f in figures):.2f} of the local state")
    print(f"host memory of a restore, with the state: {max(f['restore'] / f['local'] for f in figures):.2f} of the local state")
    print(f"digests of content: {worst['digest'] * 1000:.0f} ms, {worst['digest'] / worst['saved']:.1%} of a save")
    print(f"restore on another mesh, content checked: {worst['restored']:.2f} s")


if __name__ == "__main__":
    main()
