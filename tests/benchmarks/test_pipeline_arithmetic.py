"""The layouts of docs/pipeline.md are runs that the config accepts."""

from pathlib import Path

from k2jax.config import Config

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def test_every_layout_can_be_run(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from pipeline_arithmetic import COMPARED, SEQUENCE

    for layout in (layout for _, layouts in COMPARED for layout in layouts):
        rows = layout.expert * layout.fsdp * layout.tokens // SEQUENCE * layout.microbatches
        changes = {
            "mesh.stage": layout.stage,
            "mesh.fsdp": layout.fsdp,
            "mesh.expert": layout.expert,
            "data.batch_sequences": rows,
            "train.num_microbatches": layout.microbatches,
            "train.microbatches_together": layout.microbatches // layout.passes if layout.stage > 1 else None,
            "train.eval_sequences": layout.devices,
        }
        config = Config().replace(changes)
        assert config.validate() == config, layout
