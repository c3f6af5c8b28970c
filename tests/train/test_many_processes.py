"""Many processes train one run as one process does, bit for bit, and stop and fail together."""

import functools
from pathlib import Path

import many
import micro
import pytest

from k2jax.train.metrics import WALL_CLOCK

pytestmark = pytest.mark.slow
MESHES = {
    "fsdp 2 x expert 2 x tensor 2": ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2"),
    "expert 4 x fsdp 2": ("--mesh.expert", "4", "--mesh.fsdp", "2"),
    "context 2 x expert 4": ("--mesh.context", "2", "--mesh.expert", "4"),
    "stage 2 x fsdp 4": ("--mesh.stage", "2", "--mesh.fsdp", "4", "--model.num-hidden-layers", "3"),
}
EXACT = "--optim.ns-dtype", "float32"  # bf16 amplifies what another order of sums rounds
SHORT = {"num-steps": 10, "compile-cache": "../compiled", "self-check": "off"}


def options(name: str, **changes: object) -> list[str]:
    """Of the run directory `name`: a short run, but for `changes` of section train."""
    values = SHORT | {"run-dir": name} | {key.replace("_", "-"): value for key, value in changes.items()}
    return [text for key, value in values.items() for text in (f"--train.{key}", str(value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    micro.make_store(folder)
    return folder


def trained(place: Path, name: str, count: int, devices: int, *arguments: str, **changes: object) -> Path:
    ended = many.train(place, count, devices, *options(name, **changes), *arguments)
    assert ended.codes == [0] * max(count, 1), "\n".join(ended.outputs)
    return place / name


@functools.cache
def alone(place: Path, mesh: str) -> Path:
    """Ten steps of one process without jax.distributed, whose collectives are XLA's own."""
    return trained(place, f"{mesh.replace(' ', '')}-alone", 0, 8, *MESHES[mesh], *EXACT)


def same(one: Path, other: Path) -> None:
    """Every field of every record but the clock's, and every digest of the last checkpoint."""
    clock = (*WALL_CLOCK, "crc32")
    a, b = ([{k: v for k, v in r.items() if k not in clock} for r in many.records(run)] for run in (one, other))
    assert len(a) == 10 and a == b and many.content(one, 10) == many.content(other, 10)


@pytest.mark.parametrize(
    ("mesh", "counts"),
    [
        ("fsdp 2 x expert 2 x tensor 2", (4,)),
        pytest.param("fsdp 2 x expert 2 x tensor 2", (2, 8), marks=pytest.mark.grid),
        pytest.param("expert 4 x fsdp 2", (2, 4), marks=pytest.mark.grid),
        pytest.param("context 2 x expert 4", (2, 4), marks=pytest.mark.grid),
        pytest.param("stage 2 x fsdp 4", (2, 4), marks=pytest.mark.grid),
    ],
)
def test_many_processes_train_as_one(place, mesh, counts):
    """Equal in every bit to one process that uses the same collectives."""
    axes, name = (*MESHES[mesh], *EXACT), mesh.replace(" ", "") + str(counts[0])
    one = trained(place, f"{name}-1", 1, 8, *axes)
    for count in counts:
        run = trained(place, f"{name}-{count}", count, 8 // count, *axes, log_ranks="True")
        same(one, run)
        logs = {path.name: path.read_text() for path in (run / "ranks").iterdir()}
        assert {*logs} == {f"{i}.log" for i in range(1, count)} and all("step 10/10" in text for text in logs.values())


@pytest.mark.grid
@pytest.mark.parametrize("mesh", MESHES)
def test_gloo_sums_as_xla_does(place, mesh):
    """One process by jax.distributed against one without, whose collectives are XLA's own: within 1e-6."""
    one = trained(place, f"{mesh.replace(' ', '')}-gloo", 1, 8, *MESHES[mesh], *EXACT)
    pairs = zip(many.records(alone(place, mesh)), many.records(one), strict=True)
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)
    print(f"{mesh}: {worst:.1e} from one process without jax.distributed")
    assert worst <= 1e-6


CHAINS = {  # processes, devices of each, last step, mesh
    "2 -> 1": [(2, 4, 5, "fsdp 2 x expert 2 x tensor 2"), (1, 8, 10, "expert 4 x fsdp 2")],
    "4 -> 2 -> 1 -> 4": [
        (4, 2, 3, "fsdp 2 x expert 2 x tensor 2"),
        (2, 4, 5, "expert 4 x fsdp 2"),
        (1, 8, 7, "context 2 x expert 4"),
        (4, 2, 10, "expert 4 x fsdp 2"),
    ],
}


@pytest.mark.grid
@pytest.mark.parametrize("chain", CHAINS)
def test_other_counts_and_meshes_go_on_exactly(place, chain):
    """Another mesh each time: every restore proves the content by its digests, and rows come once."""
    for count, devices, steps, mesh in CHAINS[chain]:
        run = trained(place, f"moved {len(CHAINS[chain])}", count, devices, *EXACT, *MESHES[mesh], num_steps=steps)
    a, b = many.records(run), many.records(alone(place, "fsdp 2 x expert 2 x tensor 2"))
    assert [r["tokens"] for r in a] == [r["tokens"] for r in b] and len(a) == 10
    assert max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True)) <= 1e-6


@pytest.mark.parametrize(
    ("count", "moment"), [(2, "4"), *(pytest.param(4, name, marks=pytest.mark.grid) for name in ("4", "save", "commit", "eval"))]
)
def test_sigterm_to_one_stops_all_after_the_same_step(place, count, moment):
    name = f"term-{count}-{moment}"
    ended = many.train(
        place, count, 4 // count, *options(name, num_steps=400, eval_every=4), "--mesh.expert", "4", event=f"term:{count // 2}:{moment}"
    )
    assert ended.codes == [143] * count, "\n".join(ended.outputs)
    step = len(many.records(place / name))
    assert 4 < step < 20 and f"stopped after step {step}, saved" in ended.outputs[0]
    assert max(int(p.stem) for p in (place / name / "checkpoints").glob("*.json")) == step and ended.seconds < 15


@pytest.mark.grid
@pytest.mark.parametrize("event", ["raise:1:3", "full:0:3"])
def test_what_one_fails_with_ends_all_by_its_name(place, event):
    name = event.replace(":", "-")
    ended = many.train(place, 2, 2, *options(name, num_steps=400), "--mesh.expert", "4", event=event)
    kind, process, _ = event.split(":")
    why = {"raise": "ZeroDivisionError: as the test wants it", "full": "No space left on device"}[kind]
    assert ended.codes == [1, 1] and ended.seconds < 10, ended
    other = 1 - int(process)
    assert why in ended.outputs[int(process)] and f"process {process} failed: " in ended.outputs[other]
    words = (place / name / "ranks" / f"{process}.failed").read_text()
    assert why in words and f"process {process} of 2" in words


@pytest.mark.grid
@pytest.mark.parametrize("process", ["-1", "1"])
def test_a_save_that_has_begun_is_committed_before_a_failure_ends_all(place, process):
    """Of all processes alike, as by check_health, or of one while the other waits for it in the next step."""
    name = f"bad{process}"
    ended = many.train(place, 2, 2, *options(name, num_steps=400), "--mesh.expert", "4", event=f"bad:{process}:4")
    assert ended.codes == [1, 1] and ended.seconds < 10, ended
    failed = ended.outputs[abs(int(process))]
    assert "too many bad rows; a save is under way, and is waited for, 1200 s at most" in failed, ended
    assert (place / name / "checkpoints" / "4.json").exists() and "failed: too many bad rows" in "".join(ended.outputs)


def doubled(lines):
    lines[2][lines[2].index("--process-id") + 1] = "1"


def missing(lines):
    del lines[2]
    for line in lines:
        line += ["--join-timeout", "3"]


def another_config(lines):
    lines[2] += ["--data.seed", "5"]


def another_count(lines):
    lines[2][lines[2].index("--num-processes") + 1] = "5"


def another_store(lines):
    lines[2] += ["--data.path", "./store/../store"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (doubled, "process id 1 was given twice: process 1 on "),
        (missing, "after 3 s these processes have not come: 2 (of 4)"),
        (another_config, "config data.seed: must be the same in all processes; 0 in processes 0"),
        pytest.param(another_count, "was told of 5 processes, process 0 of 4", marks=pytest.mark.grid),
        pytest.param(another_store, "config data.path: must be the same in all processes", marks=pytest.mark.grid),
    ],
)
def test_processes_that_do_not_fit_all_say_so(place, change, rule):
    lines = many.commands(4, 1, *options(f"unfit-{change.__name__}"), "--mesh.fsdp", "4")
    change(lines)
    ended = many.run(place, lines, 60)
    assert ended.codes == [2] * len(lines) and all(rule in text for text in ended.outputs), ended
    assert not (place / f"unfit-{change.__name__}" / "checkpoints").exists()


@pytest.mark.grid
def test_sigterm_during_the_compile_and_a_restore(place):
    """Nothing was done yet, so nothing is saved, and the next start goes on from where the run stood."""
    for moment, step, last in (("compile", 0, 6), ("none", 6, 6), ("restore", 6, 9)):
        event = "none" if moment == "none" else f"term:1:{moment}"
        ended = many.train(place, 2, 2, *options("early", num_steps=last), "--mesh.expert", "4", event=event)
        assert ended.codes == [0 if moment == "none" else 143] * 2, "\n".join(ended.outputs)
        assert moment == "none" or f"stopped after step {step}, saved" in ended.outputs[0]
        assert len(many.records(place / "early") if step else []) == step


@pytest.mark.grid
def test_sixteen_processes(place):
    """Five steps and a common end, one device each: nothing in a start or a save grows with the square of their number."""
    axes = ("--mesh.expert", "4", "--mesh.fsdp", "4", "--train.num-microbatches", "1")
    run = trained(place, "sixteen", 16, 1, *axes, num_steps=5)
    assert len(many.records(run)) == 5 and {*many.content(run, 5)} == {*many.content(run, 4)}
