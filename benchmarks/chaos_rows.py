"""The rows of the fault scoreboard: each puts one fault into a real run, and says what came of it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import many
from chaos_rig import DEADLINE, STEPS, TOP, Outcome, Rig, Told, refused, send, trainers, wait_for

from k2jax.errors import UserError
from k2jax.runs.commits import committed_steps, damage
from k2jax.runs.rewind import rewind


def supervised(event: str, step: int | None, noticed: str = "failed first|is stuck"):
    """A fault of one process that the supervisor overcomes."""

    def scenario(rig: Rig) -> Outcome:
        name = event.replace(":", "-")
        return rig.judge(name, rig.run(name, event), step, noticed)

    return scenario


def stuck(event: str, name_of: str):
    """A hang that has to be named within two deadlines, and overcome."""

    def scenario(rig: Rig) -> Outcome:
        name = event.replace(":", "-")
        outcome = rig.judge(name, told := rig.run(name, event), int(event.split(":")[2]), f"process {name_of} is stuck")
        if outcome.verdict == "PASS" and (outcome.seconds is None or outcome.seconds > 2 * DEADLINE + 4):
            return Outcome("FAIL", f"process {name_of} not named in two deadlines: {told.all('(.*stuck.*)')[:1]}")
        return outcome

    return scenario


def crash_points(count: int):
    """SIGKILL at file operations spread over a whole run of one process, again and again in the same one."""

    def scenario(rig: Rig) -> Outcome:
        driver, place = str(TOP / "tests/train/crash_driver.py"), rig.folder / "crash"
        place.mkdir()
        (place / "store").symlink_to(rig.folder / "store")

        def train(moment: str) -> subprocess.CompletedProcess:
            argv = [sys.executable, driver, moment, "train", str(TOP / "tests/train/micro.py"), "--simulate", "1",
                    "--train.run-dir", "run", "--optim.ns-dtype", "float32", "--train.self-check", "off"]  # fmt: skip
            return subprocess.run(argv, cwd=place, env=many.ENVIRONMENT, capture_output=True, text=True, timeout=240)

        whole = train("count")
        (place / "run").rename(place / "whole")
        operations = int(whole.stdout.split("file operations: ")[1])
        for number in range(count):
            train(f"file:{5 + number * max(operations // 2 // count, 1)}")
        done = train("count")
        files = [[json.loads(line)["loss_hex"] for line in (place / run / "metrics.jsonl").read_text().splitlines()] for run in ("run", "whole")]
        if done.returncode != 0:
            return Outcome("FAIL", done.stderr[-150:])
        same = files[0] == files[1] and len(files[0]) == STEPS
        return Outcome("PASS" if same else "SILENT", f"{count} kills in one run, of {operations} operations; same losses: {same}")

    return scenario


def preempted(event: str):
    """SIGTERM to one process: all save the same step, none is lost, and what started them may start them again."""

    def scenario(rig: Rig) -> Outcome:
        name = event.replace(":", "-")
        told = rig.run(name, event, "--train.num-steps", "400", restarts=3)
        saved = told.all(r"stopped after step (\d+), saved")
        if told.code != 143 or not saved or committed_steps(rig.folder / name / "checkpoints")[-1] != int(saved[0]):
            return Outcome("FAIL", f"exit code {told.code}: {told.last()[:150]}")
        again = rig.run(name)
        if int(saved[0]) < STEPS:
            outcome = rig.judge(name, again)
            return Outcome(outcome.verdict, f"saved step {saved[0]}, exit code 143; {outcome.what}", 0.0, 0)
        return Outcome("PASS", f"saved step {saved[0]}, exit code 143", 0.0, 0)

    return scenario


def slow_host(rig: Rig) -> Outcome:
    """One process takes 0.3 s more in every step; the fault is named, nothing is started again."""
    told = rig.run("slow", "slow:1:every", once=False)
    when = told.at("process 1 holds up the others")
    if told.code != 0 or when is None or told.at("failed first") is not None or rig.problems("slow"):
        return Outcome("FAIL", f"exit code {told.code}: {told.last()[:150]}")
    steps = [int(text) for text in told.all(r"step (\d+)/")]
    return Outcome("PASS", told.all("(process 1 holds up .*)")[0][:120], when - told.at("event slow"), 0 if steps else None)


def hung_and_stopped(rig: Rig) -> Outcome:
    """SIGTERM, twice, to a launcher whose process hangs: it is over in a bounded time."""
    with rig.started("hung-stopped", "sleep:1:9", "--watchdog.step-seconds", "none") as (process, told):
        wait_for(told, "event sleep")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    seconds = time.monotonic() - began
    good = seconds < 40 and told.code not in (0, None) and not told.all("(restart 1 of)")
    return Outcome("PASS" if good else "FAIL", f"ended after {seconds:.0f} s with exit code {told.code}, not started again", seconds)


def crash_loop(rig: Rig) -> Outcome:
    told = rig.run("loop", "raise:0:2", once=False)
    if told.code == 1 and told.at("3 restarts in a row without a newer one") is not None:
        return Outcome("LOUD", f"given up after {len(told.all('(failed first)'))} tries: ZeroDivisionError each time")
    return Outcome("FAIL", f"exit code {told.code}: {told.last()[:150]}")


def clean_end(rig: Rig) -> Outcome:
    """A second undisturbed run, and the same command again when it is done."""
    outcome = rig.judge("clean", rig.run("clean"))
    again = rig.run("clean")
    done = again.code == 0 and again.at(f"done: step {STEPS}") is not None and not rig.problems("clean")
    return Outcome(outcome.verdict if done else "FAIL", "bit-equal to the first; the same command again does nothing")


def second_writer(rig: Rig) -> Outcome:
    with rig.started("two", "none", "--train.num-steps", "400") as (process, told):
        wait_for(told, r"step 2/")
        other = rig.run("two", restarts=0)
        process.send_signal(signal.SIGTERM)
    if told.code != 143:
        return Outcome("FAIL", f"the first ended with {told.code}: {told.last()[:120]}")
    return refused(other, "in use by process")


def stale_writer(rig: Rig) -> Outcome:
    """A trainer is stopped, its lock file removed as by a person who thinks it dead, a successor trains, and it wakes."""
    run = rig.folder / "stale"
    options = ("--train.num-steps", "400", "--watchdog.step-seconds", "none", "--mesh.fsdp", "1")
    with rig.started("stale", "none", *options, count=1, restarts=0) as (process, told):
        wait_for(told, r"step 6/")
        [pid] = trainers(process.pid)
        send(pid, signal.SIGSTOP)
        (run / "lock").unlink()
        successor = rig.run("stale", "none", "--mesh.fsdp", "1", count=1)
        before = [(run / "metrics.jsonl").read_bytes(), committed_steps(run / "checkpoints")]
        send(pid, signal.SIGCONT)
        process.wait(90)
    after = [(run / "metrics.jsonl").read_bytes(), committed_steps(run / "checkpoints")]
    if successor.code != 0 or told.code == 0 or before[1] != after[1]:
        return Outcome("SILENT", f"successor {successor.code}, woken {told.code}, steps {before[1]} then {after[1]}")
    if before[0] != after[0]:
        return Outcome("SILENT", "the woken trainer wrote into the successor's records")
    said = told.all(r"(the run .*(?:taken over|belong to another).*)")
    return Outcome("PASS", said[-1][:150] if said else told.last()[:150])


def disk_full(rig: Rig) -> Outcome:
    """On a file system of a few megabytes, which then gets space; where none can be mounted, by an error of the write."""
    run = rig.folder / "full"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", run], capture_output=True).returncode == 0
    if not mounted:
        return supervised("full:0:9", 9)(rig)
    try:
        told = rig.run("full", restarts=1)
        at = told.at("No space left|cannot be|could not be saved")
        steps = committed_steps(run / "checkpoints")
        subprocess.run(["mount", "-o", "remount,size=64m", run], check=True)
        outcome = rig.judge("full", rig.run("full"))
        if told.code in (0, None) or at is None:
            return Outcome("FAIL", f"full disk: exit code {told.code}: {told.last()[:120]}")
        return Outcome(outcome.verdict, f"named, steps {steps} kept; with space {outcome.what}", at)
    finally:
        subprocess.run(["umount", "-l", run])


def one_cannot_write(rig: Rig) -> Outcome:
    """One process may write no file of more than 4 kB from its ninth step on, as where its disk is full."""
    return supervised("small:1:9", 9)(rig)


def _flips(rig: Rig, name: str, count: int, edit) -> Outcome:
    """Edits of the newest step's files: each has to be found by the digests."""
    run, draw = rig.copy(name), random.Random(7)
    files = [p for p in sorted((run / "checkpoints" / str(STEPS)).rglob("*")) if p.is_file() and p.stat().st_size]
    found = 0
    for _ in range(count):
        path = draw.choice(files)
        before = path.read_bytes()
        edit(path, before, draw)
        if (path.read_bytes() if path.exists() else None) == before:
            found += 1  # another edit that changes nothing
        else:
            found += any(path.name in problem for problem in damage(run / "checkpoints", STEPS))
        path.write_bytes(before)
    if found < count:
        return Outcome("SILENT", f"{count - found} of {count} not found")
    edit(path, path.read_bytes(), draw)
    told = rig.run(name)
    kept = [p.name for p in (run / "damaged").iterdir()] if (run / "damaged").exists() else []
    if told.code != 0 or rig.problems(name) or not kept:
        return Outcome("FAIL", f"exit code {told.code}, {rig.problems(name)}: {told.last()[:100]}")
    return Outcome("PASS", f"{count} of {count} found; the step before used, {STEPS} kept in damaged/", 0.0)


def bit_flips(count: int):
    def flip(path: Path, before: bytes, draw: random.Random) -> None:
        at = draw.randrange(len(before))
        path.write_bytes(before[:at] + bytes([before[at] ^ 1 << draw.randrange(8)]) + before[at + 1 :])

    return lambda rig: _flips(rig, f"flips{count}", count, flip)


def broken_files(rig: Rig) -> Outcome:
    def edit(path: Path, before: bytes, draw: random.Random) -> None:
        kind = draw.randrange(3)
        if kind == 2:
            path.unlink()
        else:
            path.write_bytes(before[: len(before) // 2] if kind else bytes(len(before)))

    return _flips(rig, "broken", 30, edit)


def swapped_steps(rig: Rig) -> Outcome:
    """The newest two steps exchanged with their records."""
    run = rig.copy("swapped")
    steps = committed_steps(run / "checkpoints")[-2:]
    for suffix in ("", ".json"):
        a, b = (run / "checkpoints" / f"{step}{suffix}" for step in steps)
        a.rename(run / "kept")
        b.rename(a)
        (run / "kept").rename(b)
    return refused(rig.run("swapped"), r"is the record of step \d+; give it its name back")


def all_bad(rig: Rig) -> Outcome:
    run = rig.copy("bad")
    for step in committed_steps(run / "checkpoints"):
        [path, *_] = [p for p in sorted((run / "checkpoints" / str(step)).rglob("*")) if p.is_file() and p.stat().st_size > 100]
        path.write_bytes(bytes(path.stat().st_size))
    outcome = refused(rig.run("bad"), "no sound checkpoint is left")
    return outcome if outcome.verdict == "FAIL" or len(committed_steps(run / "checkpoints")) > 1 else Outcome("SILENT", "steps are gone")


def other_config(rig: Rig) -> Outcome:
    rig.copy("other")
    return refused(rig.run("other", "none", "--model.hidden-size", "48", "--train.seed", "3"), r"model\.hidden_size: the run in")


def leftovers(rig: Rig) -> Outcome:
    """Half a step, an empty one, and files of others, in the folder of checkpoints."""
    run = rig.copy("leftovers")
    last = run / "checkpoints" / str(STEPS)
    (run / "checkpoints" / f"{STEPS}.json").unlink()  # a deletion that was cut off
    next(p for p in last.rglob("*") if p.is_file()).unlink()
    (run / "checkpoints" / "24").mkdir()
    (run / "checkpoints" / "best").mkdir()
    (run / "checkpoints" / "notes.txt").write_text("mine")
    told = rig.run("leftovers")
    mine = (run / "checkpoints" / "notes.txt").exists() and (run / "checkpoints" / "best").exists()
    outcome = rig.judge("leftovers", told)
    return outcome if mine and told.at("left alone, not made by k2jax") else Outcome("FAIL", f"others' files: {mine}")


def links(rig: Rig) -> Outcome:
    """A file of the newest step replaced by a link to a copy that is not the same, and a link out of the folder."""
    run = rig.copy("links")
    path = max((p for p in (run / "checkpoints" / str(STEPS)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    (rig.folder / "elsewhere").write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(rig.folder / "elsewhere")
    (run / "lock").unlink()
    (run / "lock").symlink_to(rig.folder / "target")
    refusal = refused(rig.run("links"), "lock: is a symbolic link")
    (run / "lock").unlink()
    outcome = rig.judge("links", rig.run("links"))
    return refusal if refusal.verdict != "LOUD" or outcome.verdict != "PASS" else Outcome("PASS", f"the link refused; {outcome.what}")


def impossible(rig: Rig) -> Outcome:
    return refused(rig.run("mesh", "none", "--mesh.fsdp", "3", "--data.batch-sequences", "8"), "mesh|batch")


def elastic(rig: Rig) -> Outcome:
    """Two processes, then one with another mesh, then two again: the sums round otherwise, the rows are the same."""
    rig.run("moved", "none", "--train.num-steps", "8")
    rig.run("moved", "none", "--mesh.fsdp", "1", "--train.num-steps", "12", count=1)
    outcome = rig.judge("moved", rig.run("moved", "none", "--mesh.fsdp", "1", "--mesh.expert", "2"), exact=False)
    return Outcome(outcome.verdict, f"2 -> 1 -> 2 processes, fsdp, one device, expert: {outcome.what}; losses within 1e-6")


def rewound(rig: Rig) -> Outcome:
    """Back from the end to an earlier step, and four steps of data left out, in one that begins without them."""
    run = rig.copy("rewound")
    step = committed_steps(run / "checkpoints")[0]
    step = max(step, committed_steps(run / "checkpoints")[-2])
    rewind(str(run), step, (f"{step}-{step + 1}",))
    blind = rig.run("rewound", restarts=0)
    told = rig.run("rewound", "none", "--data.skip-steps", f"{step}-{step + 1}")
    if refused(blind, "rewound to leave out more").verdict != "LOUD" or told.code != 0:
        return Outcome("FAIL", f"without the skip {blind.code}, with it {told.code}: {told.last()[:100]}")
    losses = [[json.loads(line)["loss_hex"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, rig.folder / "reference")]
    same = losses[0][:step] == losses[1][:step] and losses[0][step] != losses[1][step] and len(losses[0]) == STEPS
    return Outcome("PASS" if same else "SILENT", f"from {STEPS} to {step}; refused without the skip, other data from there with it")


def damaged_store(rig: Rig) -> Outcome:
    """Bits of the token store's files, flipped one at a time: the start or a read names the file, or nothing changed."""
    from k2jax.data.store.reader import TokenStore

    store, draw = rig.folder / "flipped", random.Random(3)
    shutil.copytree(rig.folder / "store", store)
    whole = {split: s.read(0, s.num_tokens).tobytes() for split, streams in TokenStore(store).streams.items() for s in streams.values()}
    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name != "manifest.json" and p.stat().st_size]
    named = 0
    for _ in range(50):
        path = draw.choice(files)
        before = path.read_bytes()
        at = draw.randrange(len(before))
        path.write_bytes(before[:at] + bytes([before[at] ^ 1 << draw.randrange(8)]) + before[at + 1 :])
        try:
            for split, streams in TokenStore(store).streams.items():
                for stream in streams.values():
                    if stream.read(0, stream.num_tokens).tobytes() != whole[split]:
                        return Outcome("SILENT", f"{path.name}: other tokens were read")
        except Exception as error:  # noqa: BLE001 - whatever it is has to name the file
            named += path.name in str(error)
            if path.name not in str(error):
                return Outcome("FAIL", f"{path.name} is not named by {error}")
        path.write_bytes(before)
    return Outcome("LOUD", f"50 flips: {named} named with their file, {50 - named} in bytes that a read does not need", 0.0)


def changed_store(rig: Rig) -> Outcome:
    """A shard of the store cut short, between two starts of a run."""
    place = rig.folder / "cut"
    shutil.copytree(rig.folder / "store", place)
    rig.copy("cut-run")
    path = max((p for p in place.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-7])
    return refused(rig.run("cut-run", "none", "--data.path", "cut"), path.name)


def permutations(rig: Rig) -> Outcome:
    """The shuffle of every small size, and of sizes about powers of two and four, shows each window once."""
    import numpy as np

    from k2jax.data.loader.shuffle import permute
    from k2jax.data.loader.timeline import permutation_key

    sizes = [*range(1, 300), *(base + d for base in (1 << 10, 1 << 12, 1 << 16) for d in (-1, 0, 1)), 65_537]
    bad = [n for n in sizes if not np.array_equal(np.sort(permute(np.arange(n), n, permutation_key(5, 0, "x"))), np.arange(n))]
    return Outcome("SILENT" if bad else "PASS", f"{len(sizes)} sizes, each a bijection" if not bad else f"not for {bad[:5]}")


def changed_mixture(rig: Rig) -> Outcome:
    from k2jax.data.text.prepare import prepare

    source = Path(os.__file__).parent / "json"
    prepare(str(source), str(rig.folder / "another"), "byte", pattern="*.py", validation_fraction=0.4)
    rig.copy("mixed")
    return refused(rig.run("mixed", "none", "--data.path", "another"), "mixture: the run has another")


def taken_port(rig: Rig) -> Outcome:
    """The coordinator's port is taken by somebody else."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        argv = [sys.executable, "-m", "k2jax", "train", str(TOP / "tests/train/micro.py"), "--coordinator", address,
                "--num-processes", "2", "--process-id", "0", "--simulate", "1", "--join-timeout", "20"]  # fmt: skip
        began = time.monotonic()
        done = subprocess.run(argv, cwd=rig.folder, env=many.ENVIRONMENT, capture_output=True, text=True, timeout=90)
    seconds = time.monotonic() - began
    told = Told([(seconds, line) for line in (done.stdout + done.stderr).splitlines()], done.returncode)
    return refused(told, "port|in use|listen") if seconds < 60 else Outcome("FAIL", f"{seconds:.0f} s")


def soak(seconds: float, seed: int):
    """Faults at random moments, of a random kind and process, until the time is over; then the run has to end well."""

    def scenario(rig: Rig) -> Outcome:
        draw, until, faults = random.Random(seed), time.monotonic() + seconds, []
        while time.monotonic() < until and not (rig.folder / "soak" / "curves.png").exists():
            with rig.started("soak", once=False, restarts=50) as (process, told):
                wait_for(told, r"event|step \d+/|compile")
                while process.poll() is None and time.monotonic() < until:
                    time.sleep(draw.uniform(4, 12))
                    if pids := trainers(process.pid):
                        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
                        faults.append(number.name)
                        send(draw.choice(pids), number)
                if process.poll() is None:
                    process.wait(200)
        told = rig.run("soak")
        outcome = rig.judge("soak", told)
        kinds = ", ".join(f"{faults.count(kind)} {kind}" for kind in sorted({*faults}))
        return Outcome(outcome.verdict, f"{kinds}; {outcome.what}")

    return scenario


ROWS = {
    "A1": ("worker killed in a step", supervised("kill:1:12", 12)),
    "A2": ("coordinator killed in a step", supervised("kill:0:12", 12)),
    "A3": ("worker killed in a save", supervised("kill:1:commit", None)),
    "A4": ("coordinator killed in a save", supervised("kill:0:commit", None)),
    "A5": ("killed at file operations", crash_points(8)),
    "A6": ("killed in the first compile", supervised("kill:1:compile", None)),
    "A7": ("host frozen (SIGSTOP)", stuck("stop:1:9", "1")),
    "A8": ("hangs in the main thread", stuck("sleep:1:9", "1")),
    "A9": ("hangs, holds the interpreter's lock", stuck("hold:1:9", "1")),
    "A10": ("slow host", slow_host),
    "A11": ("SIGTERM to one process", preempted("term:1:8")),
    "A12": ("SIGTERM in a save", preempted("term:1:save")),
    "A12b": ("SIGTERM twice to a hung run", hung_and_stopped),
    "A13": ("the same exception at every start", crash_loop),
    "A14": ("clean end, and again", clean_end),
    "A15": ("second writer", second_writer),
    "A15b": ("stopped writer wakes after its successor", stale_writer),
    "B1": ("disk full", disk_full),
    "B2": ("one process cannot write", one_cannot_write),
    "B3": ("bits flipped in the newest step", bit_flips(50)),
    "B4": ("files cut, zeroed, missing", broken_files),
    "B5": ("steps exchanged", swapped_steps),
    "B6": ("all steps bad", all_bad),
    "B7": ("another config", other_config),
    "B8": ("half a step, files of others", leftovers),
    "B9": ("links in the run directory", links),
    "C1": ("bits flipped in the token store", damaged_store),
    "C2": ("shard cut short", changed_store),
    "C5": ("every shuffle a bijection", permutations),
    "C6": ("other data on resume", changed_mixture),
    "D3": ("rewind and skip", rewound),
    "E1": ("other meshes and counts", elastic),
    "E2": ("impossible mesh", impossible),
    "F2": ("coordinator's port taken", taken_port),
}
FAST = ("A1", "A8", "A11", "B3", "B5", "C1", "C5")
