"""`k2jax inspect` against the published counts and against the state that a run really holds."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from k2jax.config import Config, MeshConfig
from k2jax.launch.cli import main
from k2jax.launch.overrides import load_config
from k2jax.sharding.mesh import make_mesh
from k2jax.train.inspect import describe, draw_mesh
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state

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


def test_bytes_are_those_of_the_state(tiny, mesh_of):
    """Summed over an abstract TrainState on eight devices, whose optimizer state optax itself made."""
    axes = {"fsdp": 2, "expert": 2, "tensor": 2}
    config = Config(model=tiny, mesh=MeshConfig(**axes)).validate()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(config, make_optimizer(config, mesh), mesh)

    def held(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]  # counters are no buffers
        return sum(x.dtype.itemsize * int(np.prod(x.sharding.shard_shape(x.shape))) for x in leaves)

    found = describe(config)
    assert found["bytes_per_device"]["parameters"] == held((state.params, state.router_bias))
    assert found["bytes_per_device"]["optimizer"] == held(state.opt_state)
    by_name = {entry["name"]: entry for entry in found["weights"]}
    up = by_name["params.moe.ffn.up"]
    assert (up["dims"], up["spec"], up["optimizer"]) == ("LEDF", [None, ["expert"], ["fsdp"], None], "muon")
    assert up["bytes_per_device"] * 4 == 4 * int(np.prod(up["shape"]))


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


@pytest.mark.parametrize("context", [1, 2])
def test_picture_with_replicas_and_context(tiny, context):
    config = Config(model=tiny, mesh=MeshConfig(replica=2, tensor=4 // context, context=context))
    lines = draw_mesh(config, 200).splitlines()
    numbers = [int(cell.split()[0]) for line in lines[1:] for cell in line.split("dev")[1:]]
    assert sorted(numbers) == list(range(8))
    ids = np.vectorize(lambda d: d.id)(make_mesh(config.mesh).devices)  # [replica, 1, 1, tensor, context]
    drawn = np.array(numbers).reshape(2, context, 4 // context)
    assert (drawn == ids.reshape(2, 4 // context, context).transpose(0, 2, 1)).all()
