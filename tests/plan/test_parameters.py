"""`k2jax inspect` against the published counts and against the state that a run really holds."""

import collections
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from k2jax.cli.main import main
from k2jax.cli.overrides import load_config
from k2jax.config import Config, MeshConfig
from k2jax.plan.aot import expected_exchanges
from k2jax.plan.mesh_picture import draw_mesh
from k2jax.plan.parameters import describe, tables
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.names import AXES
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import init_state

CONFIGS = Path(__file__).parents[2] / "configs"


def inspect(capsys, name, *arguments):
    assert main(["inspect", str(CONFIGS / name), *arguments]) == 0
    return capsys.readouterr().out


def test_published_counts(capsys):
    """k2-facts 1.3, exactly; and each config is valid on its mesh."""
    k2, deepseek, moonlight = (
        json.loads(inspect(capsys, f"{name}.py", "--json"))["parameters"]
        for name in ("k2_1t", "deepseek_v3", "moonlight_16b")
    )
    assert k2["total"] == 1_026_408_232_448
    assert round(k2["activated"] / 1e6) == 32_862 and round(k2["activated_non_embedding"] / 1e6) == 30_513
    assert deepseek["total"] == 671_026_419_200
    assert moonlight["total_non_embedding"] == 15_289_021_568
    assert moonlight["activated_non_embedding"] == 2_243_687_552
    for found in (k2, deepseek, moonlight):
        assert sum(found["total_by_component"].values()) == found["total"]


def test_k2_fields_are_the_published_ones():
    """Config() is K2: the file says nothing else of the model, it only says it in full."""
    assert load_config(str(CONFIGS / "k2_1t.py")).model == Config().model


def test_one_trillion_in_seconds(capsys):
    started = time.monotonic()
    text = inspect(capsys, "k2_1t.py")
    assert time.monotonic() - started < 10
    assert "1,026,408,232,448" in text and "params.moe.ffn.gate" in text


SIZES = dict.fromkeys(AXES, 1) | {"fsdp": 2, "expert": 2, "tensor": 2}
CHAINS = """
import jax, optax
from k2jax.optim import scale_by_muon
def adafactor(setup): return optax.adafactor(setup.learning_rate, min_dim_size_to_factor=8)
def lion(setup): return optax.lion(setup.learning_rate)
def sgd(setup): return optax.sgd(setup.learning_rate)
def half_muon(setup):
    labels = jax.tree.map_with_path(lambda p, x: "muon" if "'moe'" in str(p) and x == "muon" else "rest", setup.labels)
    return optax.partition({"muon": scale_by_muon(dimension_numbers=setup.matrices), "rest": optax.sgd(0.1)}, labels)
def broken_init(setup):
    def init(params): raise KeyError("no such state")
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
"""


def config_of(model, tmp_path, chain):
    """A config on eight devices with one of CHAINS, or muonclip."""
    config = Config(model=model, mesh=MeshConfig(fsdp=2, expert=2, tensor=2)).validate()
    if chain == "muonclip":
        return config
    (tmp_path / "chains.py").write_text(CHAINS)
    return config.replace({"optim.optimizer": f"{tmp_path}/chains.py:{chain}", "optim.qk_clip_tau": None})


@pytest.mark.parametrize("chain", ["muonclip", "adafactor", "lion", "sgd"])
def test_bytes_are_those_of_the_state(tiny, tmp_path, chain):
    """Of the shards that each of eight devices really holds, in a state that optax itself made."""
    config = config_of(tiny, tmp_path, chain)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = init_state(config, make_optimizer(config, mesh))

    def held(tree):
        by_device = collections.Counter()
        for shard in (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards):
            by_device[shard.device] += shard.data.nbytes
        assert len(by_device) == 8 and len(set(by_device.values())) == 1  # the mesh cuts evenly
        return by_device[jax.devices()[0]]

    found = describe(config)
    assert found["bytes_per_device"]["parameters"] == held((state.params, state.router_bias))
    assert found["bytes_per_device"]["optimizer"] == held(state.opt_state)
    by_name = {entry["name"]: entry for entry in found["weights"]}
    up = by_name["params.moe.ffn.up"]
    assert (up["dims"], up["spec"], up["optimizer"]) == ("LEDF", [None, ["expert"], ["fsdp", "tensor"], None], "muon")
    assert up["bytes_per_device"] * 8 == 4 * int(np.prod(up["shape"]))


def test_work_of_muon_is_that_of_the_chain(tiny, tmp_path):
    """A chain without Muon has none, and one with Muon for some parameters has theirs alone."""
    config = config_of(tiny, tmp_path, "adafactor")
    none = describe(config)
    assert none["optimizer_assignment"]["leaves"] == [] and none["optimizer_assignment"]["temp_bytes"] == 0
    assert "Newton-Schulz" not in tables(none) and expected_exchanges(config, SIZES) == 0
    half, whole = (
        describe(config_of(tiny, tmp_path, chain))["optimizer_assignment"]["leaves"]
        for chain in ("half_muon", "muonclip")
    )
    assert half == [leaf for leaf in whole if leaf["name"].startswith("params.moe.")] and len(half) < len(whole)


def test_a_chain_that_fails_is_named(tmp_path, capsys):
    (tmp_path / "chains.py").write_text(CHAINS)
    name = f"{tmp_path}/chains.py:broken_init"
    options = ["--optim.optimizer", name, "--optim.qk-clip-tau", "none"]
    assert main(["inspect", str(CONFIGS / "tiny.py"), *options]) != 0
    error = capsys.readouterr().err
    assert f"optim.optimizer = '{name}': KeyError: 'no such state'" in error and "Traceback" not in error


def test_plan_of_the_optimizer(tiny):
    """By hand: 2 layers of 8 experts on fsdp 2 x expert 2 x tensor 2, 8 matrices for each group of 4 devices."""
    config = Config(model=tiny, mesh=MeshConfig(fsdp=2, expert=2, tensor=2)).validate()
    found = describe(config)["optimizer_assignment"]
    by_name = {leaf["name"]: leaf for leaf in found["leaves"]}
    step_flops = 4 * 24 * 24 * 48 + 2 * 24**3
    assert by_name["params.moe.ffn.up"] == {
        "name": "params.moe.ffn.up",
        "matrix": [48, 24],
        "matrices": 16,
        "slots_per_device": 2,
        "padding": 0,
        "copies": 1,
        "bytes_moved_each_way": 2 * 48 * 24 * 2 * 3 // 4,  # bf16, of which a quarter is the device's own
        "flops_per_matrix": 5 * step_flops,
        "flops_per_device": 2 * 5 * step_flops,
        "temp_bytes": 2 * 48 * 24 * 2 + 4 * 2 * 48 * 24 * 2,
    }
    assert by_name["params.moe.attention.o"]["matrix"] == [40, 48]
    assert by_name["params.moe.attention.o"]["padding"] == 0.75  # two layers on eight devices
    names = [entry["name"] for entry in describe(config)["weights"] if entry["optimizer"] == "muon"]
    assert list(by_name) == names
    assert found["bytes_moved_each_way"] == sum(leaf["bytes_moved_each_way"] for leaf in found["leaves"])
    total = sum(leaf["matrices"] * leaf["flops_per_matrix"] for leaf in found["leaves"])
    assert found["flops_per_device"]["mean"] == pytest.approx(total / 8)
    assert found["matrices_per_device"]["mean"] == sum(leaf["matrices"] for leaf in found["leaves"]) / 8


def test_plan_is_printed(capsys):
    """K2 on its config's own mesh."""
    text = inspect(capsys, "k2_1t.py")
    assignment = text[text.index("Newton-Schulz of") :]
    assert re.search(r"params.moe.ffn.gate +7168 x 2048 +23,040 +23 +2.2% +1 ", assignment)
    assert re.search(r"per device: 69 matrices at most, 68.0 on average; .* 1.13 times the average", assignment)


def test_picture_of_the_mesh(tiny, capsys, tmp_path):
    """Device numbers are those of jax's mesh; what does not fit the terminal is counted."""
    config = Config(model=tiny, mesh=MeshConfig(fsdp=2, expert=2, tensor=2))
    lines = draw_mesh(config, 200).splitlines()
    numbers = [[int(cell.split()[0]) for cell in line.split("dev")[1:]] for line in lines[1:]]
    mesh = make_mesh(config.mesh)
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 4)  # fsdp down, expert and tensor across
    assert numbers == ids.tolist()
    assert lines[0].split("  ")[-1].strip() == "E 4-7 H 2-3"
    assert "devices more" in draw_mesh(config, 40)
    inspect(capsys, "tiny.py", "--png", str(tmp_path / "mesh.png"))
    assert (tmp_path / "mesh.png").read_bytes()[:4] == b"\x89PNG"


def test_picture_with_stages(tiny):
    config = Config(model=tiny, mesh=MeshConfig(stage=2, fsdp=2, expert=2))
    head, *lines = draw_mesh(config, 200).splitlines()
    assert [line.split("dev")[0].strip() for line in lines][:3] == [
        "replica 0 stage 0 fsdp 0", "replica 0 stage 0 fsdp 1", "replica 0 stage 1 fsdp 0",
    ]  # fmt: skip
    ids = np.vectorize(lambda d: d.id)(make_mesh(config.mesh).devices).reshape(4, 2)
    assert [[int(cell.split()[0]) for cell in line.split("dev")[1:]] for line in lines] == ids.tolist()


@pytest.mark.parametrize("context", [1, 2])
def test_picture_with_replicas_and_context(tiny, context):
    config = Config(model=tiny, mesh=MeshConfig(replica=2, tensor=4 // context, context=context))
    lines = draw_mesh(config, 200).splitlines()
    numbers = [int(cell.split()[0]) for line in lines[1:] for cell in line.split("dev")[1:]]
    assert sorted(numbers) == list(range(8))
    ids = np.vectorize(lambda d: d.id)(make_mesh(config.mesh).devices)  # [replica, 1, 1, 1, tensor, context]
    drawn = np.array(numbers).reshape(2, context, 4 // context)
    assert (drawn == ids.reshape(2, 4 // context, context).transpose(0, 2, 1)).all()
