"""The start banner's lines on hosts; the picture itself is tested in tests/sharding/test_device_order.py."""

import dataclasses

import jax
import micro

from k2jax.config import MeshConfig
from k2jax.sharding.mesh import make_mesh
from k2jax.train import banner as banner_module
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import abstract_state


def lines_of_banner(optimizer: str = "muonclip"):
    config = dataclasses.replace(micro.config(), mesh=MeshConfig(fsdp=2))
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    state = abstract_state(config, make_optimizer(config, mesh), mesh)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer=optimizer))
    return banner_module.banner(config, state, mesh).splitlines()


def test_small_numbers_have_no_unit_and_no_space_for_one():
    lines = "\n".join(lines_of_banner())
    assert "norms 224, " in lines and "router 132, " in lines  # micro's
    assert "= 512 tokens, 2 microbatches; 20 steps, 10.24 ktokens" in lines
    assert " kB parameters, " in lines and " kFLOP forward" in lines


def test_a_chain_of_ones_own_is_not_said_to_use_muon():
    """The trainer labels the parameters for it; what it does with the labels it alone knows."""
    assert "muonclip: muon 21.89 k, adamw " in "\n".join(lines_of_banner())
    assert "chains.py:adamw: labelled muon 21.89 k, adamw " in "\n".join(lines_of_banner("chains.py:adamw"))


def test_the_picture_of_hosts_stands_under_the_mesh(monkeypatch):
    alone = lines_of_banner()
    monkeypatch.setattr(banner_module, "picture_hosts", lambda mesh: [f"{mesh.size} devices", "crosses: nothing"])
    several = lines_of_banner()
    at = next(number for number, line in enumerate(alone) if line.startswith("mesh "))
    assert several == [*alone[: at + 1], " " * 11 + "2 devices", " " * 11 + "crosses: nothing", *alone[at + 1 :]]
