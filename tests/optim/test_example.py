"""docs/adamw_with_qk_clip.py and the snippet of docs/optimizer.md do what they say."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from k2jax.optim import muonclip

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "adamw_with_qk_clip.py"


def test_adamw_with_qk_clip_on_a_model_of_ones_own():
    """Both learn; without the clip logits leave tau behind, with it they are brought back to it."""
    example = runpy.run_path(str(EXAMPLE))
    (losses, maxima), (free_losses, free_maxima) = (example["train"](tau=tau) for tau in (example["TAU"], 1e9))
    assert losses[-1] < 0.05 and free_losses[-1] < 0.05
    assert max(free_maxima) > 5 * example["TAU"]
    assert max(maxima) < 2 * example["TAU"] and max(maxima[-50:]) < 1.3 * example["TAU"]


def snippet(number: int = 0) -> tuple[dict, str]:
    """The names that a block of docs/optimizer.md's code leaves behind, and the page."""
    page = (DOCS / "optimizer.md").read_text()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number], names)
    return names, page


def test_the_snippet_of_the_page():
    """A head at 250 with tau = 100 takes the root of 0.4 in q and in k: the new weights are the old ones times it."""
    names, _ = snippet()
    params, max_logits = names["params"], jnp.full((1, 4), 250.0)
    tx, free = names["tx"], muonclip(2e-4, names["labels"], dimension_numbers=names["views"])
    expected, _ = free.update(params, free.init(params), params)
    updates, _ = tx.update(params, tx.init(params), params, max_logits=max_logits)
    for name in ("q", "k"):
        np.testing.assert_allclose(params[name] + updates[name], 0.4**0.5 * (params[name] + expected[name]), rtol=1e-5)
    assert jax.tree.map(jnp.shape, names["updates"]) == jax.tree.map(jnp.shape, params)


def static_arguments(page: str) -> tuple[str, ...]:
    return eval(re.search(r"static_args=(\(.*?\))", page, re.DOTALL).group(1))


def test_inject_hyperparams_with_the_pages_static_arguments():
    names, page = snippet()
    static = static_arguments(page)
    params, rest = names["params"], dict(dimension_numbers=names["views"])
    tx = optax.inject_hyperparams(muonclip, static_args=static)(2e-4, names["labels"], names["parts"], **rest)
    state, maxima = tx.init(params), jnp.full((1, 4), 250.0)
    assert {"learning_rate", "tau", "momentum", "rms", "weight_decay"} <= set(state.hyperparams)
    updates, state = jax.jit(tx.update)(params, state, params, max_logits=maxima)
    for name in params:
        np.testing.assert_allclose(updates[name], names["updates"][name], rtol=1e-5)
    state.hyperparams["tau"] = jnp.float32(1e9)
    assert not np.allclose(tx.update(params, state, params, max_logits=maxima)[0]["q"], updates["q"])


def test_inject_hyperparams_with_rules_by_path():
    """A function that is not static is taken for a schedule: called with the step, not with the parameters."""
    names, page = snippet(1)
    tx = optax.inject_hyperparams(muonclip, static_args=static_arguments(page))(1e-3, **names["rules"])
    params = names["params"]
    updates, _ = tx.update(params, tx.init(params), params, max_logits=jnp.full((1, 4), 250.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), updates, names["updates"])


def test_the_snippet_with_flax():
    """Query and key of every head take the root of 0.4, kernel and bias; the out projection is one matrix [64, 64]."""
    names, _ = snippet(1)
    params, updates = names["params"], names["updates"]
    rest = {key: rule for key, rule in names["rules"].items() if key != "qk_parts"}
    expected, _ = (free := muonclip(1e-3, **rest)).update(params, free.init(params), params)
    for layer in ("query", "key"):
        for name, value in params[layer].items():
            want = 0.4**0.5 * (value + expected[layer][name])
            np.testing.assert_allclose(value + updates[layer][name], want, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(updates["value"]["kernel"], expected["value"]["kernel"])
    out = np.asarray(updates["out"]["kernel"] + 1e-4 * params["out"]["kernel"]).reshape(64, 64)  # decay taken out
    singular = np.linalg.svd(out / 1e-3 / (0.2 * 8), compute_uv=False)
    assert 0.5 < singular[-2] and singular[0] < 1.3  # all but one weak direction of the gradient
    moved = nnx.to_pure_dict(nnx.state(names["model"], nnx.Param))
    fresh = nnx.to_pure_dict(nnx.state(nnx.MultiHeadAttention(4, 64, 64, decode=False, rngs=nnx.Rngs(0)), nnx.Param))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(fresh), strict=True))
