"""docs/adamw_with_qk_clip.py does what it says."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "adamw_with_qk_clip.py"


def test_adamw_with_qk_clip_on_a_model_of_ones_own():
    """Both learn; without the clip logits leave tau behind, with it they are brought back to it."""
    example = runpy.run_path(str(EXAMPLE))
    (losses, maxima), (free_losses, free_maxima) = (example["train"](tau=tau) for tau in (example["TAU"], 1e9))
    assert losses[-1] < 0.05 and free_losses[-1] < 0.05
    assert max(free_maxima) > 5 * example["TAU"]
    assert max(maxima) < 2 * example["TAU"] and max(maxima[-50:]) < 1.3 * example["TAU"]
