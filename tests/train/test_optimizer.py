"""The optimizer that a config names: found, checked, laid out like the parameters; and mistakes in it are named."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import micro
import optax
import pytest
from test_step import make_config

from k2jax.errors import UserError
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.optim import group_labels
from k2jax.sharding.mesh import single_device_mesh
from k2jax.sharding.names import AXES
from k2jax.train.optimizer import make_optimizer, state_specs

CHAINS = """
import jax, optax
import jax.numpy as jnp
from k2jax.optim import QKPart, muonclip_of, qk_clip

def adamw(setup):
    return optax.chain(optax.adamw(setup.learning_rate), qk_clip(setup.config.qk_clip_tau, setup.qk_parts))

def noisy(setup):
    return optax.chain(optax.noisy_sgd(setup.learning_rate, key=jax.random.key(3)), optax.scale(3.0))

def unclipped(setup):
    return optax.adafactor(setup.learning_rate)

def unlabelled(setup):
    labels = setup.labels
    labels["head"] = None
    return optax.partition({"muon": optax.sgd(0.1), "adamw": optax.adam(0.1)}, labels)

def masked(setup):
    mask = jax.tree.map(lambda label: label == "adamw", setup.labels)
    return optax.masked(optax.adam(0.1), mask)

def nothing(setup):
    return 3

def every_two(setup):
    return optax.MultiSteps(adamw(setup), 2).gradient_transformation()

def every_two_bare(setup):
    return optax.MultiSteps(adamw(setup), 2)

def if_finite(setup):
    return optax.apply_if_finite(adamw(setup), 3)

def on_even_steps(setup):
    return optax.chain(optax.conditionally_transform(adamw(setup), lambda step: step % 2 == 0))

def if_finite_before(setup):
    clip = qk_clip(setup.config.qk_clip_tau, setup.qk_parts)
    return optax.chain(optax.apply_if_finite(optax.adamw(setup.learning_rate), 3), clip)

def if_positive(setup):
    inner = adamw(setup)
    def update(grads, state, params, **extra):
        new, state = inner.update(grads, state, params, **extra)
        return jax.tree.map(lambda u: jnp.where(extra["value"] > 0, u, 0), new), state
    return optax.GradientTransformationExtraArgs(inner.init, update)

def not_last(setup):
    return optax.chain(qk_clip(setup.config.qk_clip_tau, setup.qk_parts), optax.adam(setup.learning_rate))

def no_parts(setup):
    parts = jax.tree.map(lambda part: None, setup.qk_parts, is_leaf=lambda x: isinstance(x, QKPart))
    return optax.chain(optax.adam(setup.learning_rate), qk_clip(setup.config.qk_clip_tau, parts))

def inject(setup):
    clip = optax.inject_hyperparams(qk_clip, static_args="parts")(setup.config.qk_clip_tau, setup.qk_parts)
    return optax.chain(optax.inject_hyperparams(optax.adamw)(1e-3), clip)

def jitted(setup):
    tx = muonclip_of(setup)
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))

def frozen_router(setup):
    labels = jax.tree.map_with_path(lambda path, x: "frozen" if "router" in str(path) else "train", setup.labels)
    return optax.partition({"train": muonclip_of(setup), "frozen": optax.set_to_zero()}, labels)

def broken_init(setup):
    def init(params):
        raise KeyError("no such state")
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

def broken(setup):
    return setup.no_such_thing
"""


@pytest.fixture
def chains(tmp_path) -> str:
    (tmp_path / "chains.py").write_text(CHAINS)
    return str(tmp_path / "chains.py")


def build(tiny, name, tau=None):
    config = make_config(tiny, 1).replace({"optim.optimizer": name, "optim.qk_clip_tau": tau})
    return make_optimizer(config, single_device_mesh())


@pytest.mark.parametrize(
    ("function", "tau", "message"),
    [
        ("adam", None, "has no function adam; there are adamw, noisy, unclipped"),
        ("nothing", None, "must return an optax.GradientTransformation, got int"),
        ("broken", None, "AttributeError: 'Setup' object has no attribute 'no_such_thing'"),
        ("unlabelled", None, "head"),
        ("masked", None, "moe.ffn.gate is given its bare gradient: no transform of the chain has this parameter"),
        ("unclipped", 5.0, "optim.qk_clip_tau = 5.0: the chain of .* has no qk_clip"),
        ("adamw", None, "tau = None: must be a number"),
    ],
)
def test_mistakes_are_named(tiny, chains, function, tau, message):
    with pytest.raises(UserError, match=message) as error:
        build(tiny, f"{chains}:{function}", tau)
    assert "optim." in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("optax:nope", "optax has no function nope"),
    ],
)
def test_what_cannot_be_found(tiny, name, message):
    with pytest.raises(UserError, match=message):
        build(tiny, name)


@pytest.mark.parametrize("name", ["adamw", "chains.py:", ":adamw"])
def test_names_of_no_function_are_refused_with_the_rest(tiny, name):
    config = make_config(tiny, 1).replace({"optim.optimizer": name, "optim.momentum": 2.0})
    with pytest.raises(UserError, match=r"optim.optimizer = .*'FILE.py:function'") as error:
        config.validate()
    assert len(error.value.problems) >= 2


def test_a_clip_that_the_config_does_not_know_of(tiny, tmp_path):
    (tmp_path / "own.py").write_text(CHAINS.replace("setup.config.qk_clip_tau", "7.0"))
    with pytest.raises(UserError, match="optim.qk_clip_tau = None: the chain of .* has a qk_clip; give its tau"):
        build(tiny, f"{tmp_path}/own.py:adamw")


@pytest.mark.parametrize(
    ("function", "rule"),
    [("every_two", "use train.num_microbatches, or a larger data.batch_sequences"),
     ("every_two_bare", "use train.num_microbatches, or a larger data.batch_sequences"),
     ("if_finite", "attention.q_b is clipped in some steps only (cond chooses)"),
     ("on_even_steps", "attention.kv_b is clipped in some steps only (cond chooses)"),
     ("if_positive", "attention.q_b is clipped in some steps only (select_n chooses)"),
     ("not_last", "attention.q_b is changed after its clip (by "),
     ("no_parts", "attention.q_b is not reached by qk_clip")],
)  # fmt: skip
def test_chains_that_do_not_clip_in_every_step_are_refused(tiny, chains, function, rule):
    """optax's wrappers and one's own, and a qk_clip that is not the last, or not of every head."""
    with pytest.raises(UserError) as error:
        build(tiny, f"{chains}:{function}", 50.0)
    assert rule in str(error.value) and f"{chains}:{function}" in str(error.value)


@pytest.mark.parametrize("function", ["if_finite_before", "inject", "jitted", "frozen_router"])
def test_a_clip_at_the_end_is_fine(tiny, chains, function):
    """After a wrapper, with traced values, under the user's own jit, and in a partition that freezes another part."""
    build(tiny, f"{chains}:{function}", 50.0)


def test_groups_from_masks():
    """A parameter in no group, or in two, is an error that names all of them."""
    tree = {"a": True, "b": False, "c": True}
    assert group_labels({"x": tree, "y": {"a": False, "b": True, "c": False}}) == {"a": "x", "b": "y", "c": "x"}
    with pytest.raises(ValueError, match=r"\['b'\]: no group; \['c'\]: 'x' and 'y'"):
        group_labels({"x": tree, "y": {"a": False, "b": False, "c": True}})


@pytest.mark.parametrize(
    ("make", "buffers"),
    [(optax.lion, 1), (optax.adamw, 2), (optax.contrib.schedule_free_adamw, 2), (optax.contrib.prodigy, 4)],
)
def test_state_lies_as_the_parameters(tiny, make, buffers):
    """Every buffer of every matrix is cut like it; counters are not."""
    weights, sizes = declarations(tiny), dict.fromkeys(AXES, 1) | {"fsdp": 2, "expert": 2, "tensor": 2}
    specs = jax.tree.leaves(state_specs(make(1e-3), weights, sizes), is_leaf=lambda x: isinstance(x, jax.P))
    matrices = [w.spec(sizes) for w in weight_leaves(weights) if w.inputs]
    assert sorted(map(str, (s for s in specs if "fsdp" in str(s)))) == sorted(map(str, matrices * buffers))
    assert jax.P() in specs


@pytest.mark.grid
def test_runs_with_any_chain(tmp_path, chains):
    """The command trains with a chain of the user's on eight devices, stops, resumes: records as of one go."""
    micro.make_store(tmp_path)

    def train(run, function, steps, *more):
        command = [
            sys.executable, "-m", "k2jax", "train", micro.__file__, "--simulate", "8", "--mesh.fsdp", "4", "--mesh.expert", "2",
            "--optim.optimizer", function, "--train.run-dir", run, "--train.num-steps", str(steps),
            *more,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    example = Path(__file__).parents[2] / "docs" / "chains.py"
    clipped = train("adamw", f"{example}:adamw", 8)
    assert clipped[-1]["loss"] < clipped[0]["loss"] and not clipped[-1]["skipped"] and clipped[-1]["heads_clipped"]
    off = "--optim.qk-clip-tau", "none"
    mixed = train("mixed", f"{example}:muon_and_lion", 8, *off)
    assert mixed[-1]["loss"] < mixed[0]["loss"] and not mixed[-1]["heads_clipped"]
    noisy = f"{chains}:noisy"
    whole = train("whole", noisy, 6, *off)  # its state has a random key
    train("parts", noisy, 3, *off)
    assert [r["loss_hex"] for r in train("parts", noisy, 6, *off)] == [r["loss_hex"] for r in whole]


@pytest.mark.slow
def test_a_run_that_breaks_skips_then_stops(tmp_path):
    """A learning rate that blows the weights up: bad steps are written as such, and M in a row end the run."""
    micro.make_store(tmp_path)
    command = [
        sys.executable, "-m", "k2jax", "train", Path(__file__).parent / "micro.py", "--simulate", "1",
        "--optim.learning-rate", "1e15", "--optim.warmup-tokens", "0", "--guard.max-skips", "3",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 steps in a row were skipped" in done.stderr and "guard.max_skips = 3" in done.stderr
    records = [json.loads(line, parse_constant=pytest.fail) for line in
               (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert [r["skipped_in_a_row"] for r in records[-4:]] == [0, 1, 2, 3]
    bad = records[-1]
    assert bad["loss"] is None and bad["loss_hex"] == "nan" and bad["lost_updates_muon_float32"] is None
    assert bad["skipped_so_far"] == 3 and bad["learning_rate"] == records[-2]["learning_rate"]
    assert done.stdout.count("SKIPPED") == 3
