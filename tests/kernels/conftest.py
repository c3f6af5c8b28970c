"""Shared by the tests of tokamax's kernels."""

import pytest

from k2jax.kernels.tokamax import load_tokamax


@pytest.fixture
def use_v5p_ragged_dot(monkeypatch):
    """A function: tokamax takes its grouped matmul for TPU here, interpreted or not, and looks up v5p's tiles.

    It asks the machine that it is on, not the one that it is compiled for.
    """

    def use(**options):
        load_tokamax("grouped_matmul")
        from jax._src.pallas.mosaic import tpu_info
        from tokamax._src.ops.ragged_dot import api, pallas_mosaic_tpu

        kernel = pallas_mosaic_tpu.PallasMosaicTpuRaggedDot
        monkeypatch.setattr(kernel, "supported_on", lambda self, device: True)
        v5p = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion.TPU_V5P, 1)
        monkeypatch.setitem(tpu_info.registry, "cpu", lambda: v5p)
        implementations = dict(api.IMPLEMENTATIONS) | dict.fromkeys(("mosaic", "mosaic_tpu"), kernel(**options))
        monkeypatch.setattr(api, "IMPLEMENTATIONS", implementations)

    return use
