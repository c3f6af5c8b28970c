"""tokamax's grouped matmul, its Pallas kernel for TPUs interpreted on a CPU: `make test-kernels`."""

import jax
import numpy as np
import pytest

from k2jax.config import UserError
from k2jax.kernels.grouped_matmul import grouped_matmul

ROWS, GROUPS, WIDTH = 256, 4, 128  # the least that the kernel's tiles take
SIZES = {"random": [100, 0, 56, 100], "rows_past_the_sum": [30, 90, 0, 60], "all_in_one": [0, 0, 256, 0]}


@pytest.fixture
def interpreted(monkeypatch):
    """tokamax takes its TPU kernel on this CPU, interpreted, and looks up v5p's tiles."""
    from jax._src.pallas.mosaic import tpu_info
    from tokamax._src.ops.ragged_dot import api, pallas_mosaic_tpu

    kernel = pallas_mosaic_tpu.PallasMosaicTpuRaggedDot
    monkeypatch.setattr(kernel, "supported_on", lambda self, device: True)
    v5p = lambda: tpu_info._get_tpu_info_impl(tpu_info.ChipVersion.TPU_V5P, 1)  # noqa: E731
    monkeypatch.setitem(tpu_info.registry, "cpu", v5p)
    implementations = dict(api.IMPLEMENTATIONS) | {"mosaic_tpu": kernel(interpret=True)}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", implementations)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")  # of tokamax, about itself
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernel_agrees_with_a_loop(interpreted, sizes):
    """Values and gradients of two weights at once, to the rounding of float32 sums."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(ROWS, 2 * WIDTH))
    w = rng.normal(size=(2, GROUPS, WIDTH, WIDTH))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros((GROUPS, WIDTH, 2 * WIDTH))
    both = np.concatenate(w, -1)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), sizes)):
        y[row], dx[row] = x[row] @ both[group], both[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    x, dy, w = (a.astype(np.float32) for a in (x, dy, w))
    run = lambda x, *w: grouped_matmul(x, w, np.array(sizes, np.int32), "tokamax")  # noqa: E731
    got_y, pull = jax.vjp(run, x, *w)
    got_dx, *got_dw = pull(dy)
    for got, want in ((got_y, y), (got_dx, dx), (np.concatenate(got_dw, -1), dw)):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_without_tokamax_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokamax", None)
    with pytest.raises(UserError, match="docs/experts.md.*'ragged_dot'"):
        grouped_matmul(np.zeros((8, 4)), (np.zeros((1, 4, 4)),), np.array([8]), "tokamax")
