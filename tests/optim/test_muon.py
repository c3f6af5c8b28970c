"""Muon as a transform: its momentum, its scale, its view of a parameter as matrices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from test_newton_schulz import reference as orthogonalise

from k2jax.optim import MatrixView, scale_by_muon
from k2jax.optim.muon import matrix_shape

SHAPES = {"matrix": (6, 9), "stack": (3, 8, 5), "heads": (2, 6, 4, 3), "output": (2, 4, 3, 6)}
VIEWS = {"matrix": MatrixView(0, 1), "stack": MatrixView(1, 1), "heads": MatrixView(1, 1), "output": MatrixView(1, 2)}
MATRICES = {"matrix": (6, 9), "stack": (3, 8, 5), "heads": (2, 6, 12), "output": (2, 12, 6)}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def run(steps, **options):
    """Updates of `steps` successive gradients, in float64."""
    with jax.enable_x64(True):
        tx = scale_by_muon(dimension_numbers=VIEWS, dtype=jnp.float64, **options)
        state = tx.init(jax.tree.map(jnp.asarray, gradients(0)))
        results = []
        for step in range(steps):
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradients(step)), state)
            results.append(jax.device_get(updates))
        return results


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_agree_with_a_loop(nesterov):
    """M = mu M + G, a sum; Nesterov feeds mu M + G (Moonlight 2.2). Every matrix of a stack on its own."""
    momentum, rms = 0.9, 0.3
    results = run(3, nesterov=nesterov, momentum=momentum, rms=rms)
    for name, shape in SHAPES.items():
        matrices = MATRICES[name]
        buffer = np.zeros(shape)
        for step in range(3):
            g = gradients(step)[name]
            buffer = momentum * buffer + g
            target = (momentum * buffer + g if nesterov else buffer).reshape(-1, *matrices[-2:])
            expected = np.stack([rms * np.sqrt(max(matrices[-2:])) * orthogonalise(m) for m in target]).reshape(shape)
            np.testing.assert_allclose(results[step][name], expected, rtol=0, atol=1e-12, err_msg=f"{name} {step}")


def test_views():
    for name, shape in SHAPES.items():
        assert matrix_shape(shape, VIEWS[name]) == MATRICES[name][-2:], name


def test_optax_dimension_numbers_mean_the_same():
    """One parameter's dims in another order, said by optax's MuonDimensionNumbers: the same update, transposed."""
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(3, 6, 4, 5)).astype(np.float32)  # [stack, inputs, outputs, outputs]
    theirs = np.ascontiguousarray(ours.transpose(2, 0, 3, 1))  # [out, stack, out, in]
    numbers = MuonDimensionNumbers(reduction_axis=3, output_axis=(0, 2))
    updates = []
    for x, view in ((ours, MatrixView(1, 1)), (theirs, numbers), (theirs, lambda params: {"w": numbers})):
        tree = {"w": x} if callable(view) else x
        tx = scale_by_muon(dtype=jnp.float32, dimension_numbers=view)
        update, _ = tx.update(tree, tx.init(tree))
        updates.append(update["w"] if callable(view) else update)
    np.testing.assert_allclose(updates[1], updates[0].transpose(2, 0, 3, 1), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(updates[2], updates[1])


def test_leaves_without_a_view_are_named():
    tx = scale_by_muon()
    tree = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4), "heads": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match=r"no matrices: \['bias'\] \(4,\), \['heads'\] \(2, 3, 4\)"):
        tx.update(tree, tx.init(tree))


def test_agrees_with_torch():
    """golden/torch_muon.npz (make_torch_muon.py): three steps of torch.optim.Muon with match_rms_adamw, in its bf16.

    torch runs Newton-Schulz in bfloat16, so its own distance to the float64 formula bounds what can be asked.
    """
    golden = np.load(Path(__file__).parent / "golden" / "torch_muon.npz")
    for name in ("tall", "wide", "square"):
        tx = optax.chain(
            scale_by_muon(dtype=jnp.bfloat16), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
        )
        params = jnp.asarray(golden[f"{name}_start"])
        start, state = params, tx.init(params)
        for gradient in golden[f"{name}_gradients"]:
            updates, state = tx.update(jnp.asarray(gradient), state, params)
            params = optax.apply_updates(params, updates)
        moved, theirs = params - start, golden[f"{name}_end"] - golden[f"{name}_start"]
        assert np.linalg.norm(moved - theirs) / np.linalg.norm(theirs) < 0.06, name  # 0.03 to 0.04 measured


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 96)], ids=str)
def test_rms_of_the_update(shape):
    """0.2 * f where all singular values are equal, f being Newton-Schulz's there; near 0.2 for a Gaussian."""
    rng = np.random.default_rng(0)
    short = min(shape)
    equal = np.linalg.qr(rng.normal(size=(max(shape), short)))[0]
    equal = equal if shape[0] > shape[1] else equal.T
    f = np.linalg.norm(orthogonalise(equal), 2)
    exact = 0.2 * f * (1 - 1e-5), 0.2 * f * (1 + 1e-5)
    for gradient, (low, high) in ((equal, exact), (rng.normal(size=shape), (0.16, 0.22))):
        gradient = gradient.astype(np.float32)
        tx = scale_by_muon(dtype=jnp.float32)
        update, _ = tx.update(gradient, tx.init(gradient))
        assert low < np.sqrt(np.mean(np.square(update))) < high


@pytest.mark.parametrize(
    "view",
    [MatrixView(1, 1), MatrixView(0, 2), MatrixView(-1, 1), MuonDimensionNumbers(5, 0), MuonDimensionNumbers(0, -2),
     MuonDimensionNumbers((0, 1), ()), (0, 1)],
    ids=str,
)  # fmt: skip
def test_views_that_make_no_matrix_are_named(view):
    """Else they would be read as vectors, or as dims that nobody meant; init says so, before a step is made."""
    params = {"fine": jnp.ones((3, 4)), "wrong": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"no matrices: \['wrong'\] \(3, 4\) by .*dimension_numbers"):
        scale_by_muon(dimension_numbers={"fine": None, "wrong": view}).init(params)


def test_mistakes_of_the_call():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match=r"not shaped like the parameters"):
        scale_by_muon(dimension_numbers={"b": MatrixView(1, 1)}).init(params)
    with pytest.raises(ValueError, match=r"no matrices: \['b'\] \(2, 3, 4\);"):
        scale_by_muon(dimension_numbers={"a": MatrixView(0, 1), "b": None}).init(params)
    with pytest.raises(ValueError, match="float16: must be bfloat16"):
        scale_by_muon(dtype=jnp.float16)
    with pytest.raises(ValueError, match="coefficients = 'kimi'"):
        scale_by_muon(coefficients="kimi")
    for wrong in (dict(momentum=1.0), dict(momentum=-0.1), dict(momentum=float("nan")), dict(rms=0.0), dict(rms=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .*: must be"):
            scale_by_muon(**wrong)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_the_momentum_keeps_its_dtype(param_dtype, grad_dtype):
    """It goes through a scan, and is as exact for bf16 parameters: 0.95 M + G in float32."""
    grads_SNM = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4, 6)), grad_dtype)
    tx = scale_by_muon(dtype=jnp.float32)
    state = tx.init(jnp.ones((4, 6), param_dtype))
    state, updates = jax.lax.scan(lambda state, grad: tx.update(grad, state)[::-1], state, grads_SNM)
    assert updates.dtype == grad_dtype and state.momentum.dtype == jnp.float32
    exact = sum(0.95 ** (29 - i) * np.asarray(g, np.float64) for i, g in enumerate(grads_SNM))
    np.testing.assert_allclose(state.momentum, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
