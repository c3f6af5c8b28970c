"""The progress line at every width, the remaining time, and the lines that say what went wrong."""

import io
import re

import pytest
from rich.console import Console

from k2jax.train.display import Display, describe, short

RECORD = {
    "step": 9, "loss": 4.6522, "max_logit": 13.37, "grad_norm": 0.279, "learning_rate": 2e-2, "tokens_per_second": 12_345.6,
    "matmul_share": 0.3712, "heads_clipped": 5, "clipped_heads": ["L1H0", "L1H1", "L2H0", "L2H1", "L3H3"], "seconds": 2.0, "rows_dropped": 0,
    "skipped": False, "skipped_so_far": 0, "skip_reasons": [],
}  # fmt: skip


def show(width, terminal, records, num_steps=300):
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=terminal, soft_wrap=True, highlight=False)
    display = Display(0, num_steps, 1, console)
    for record in records:
        display.step(record)
    display.close()
    return output.getvalue()


@pytest.mark.parametrize(
    ("value", "text"), [(850, "850"), (8967, "8.97k"), (12_345, "12.3k"), (123_456, "123k"), (2e6, "2.00M")]
)
def test_short_units(value, text):
    assert short(value) == text


def test_the_least_useful_fields_go_first():
    full = describe(RECORD, 1000)
    assert full == (
        "loss 4.6522  grad  0.279  lr 2.00e-02  12.3k tok/s  37% mm  max logit  13.37  clipped 5"
        "  (L1H0, L1H1, L2H0, L2H1, ...)"
    )
    assert describe(RECORD, 87).endswith("37% mm  max logit  13.37  clipped 5") and len(describe(RECORD, 87)) == 87
    assert describe(RECORD, 80) == "loss 4.6522  grad  0.279  lr 2.00e-02  12.3k tok/s  37% mm  max logit  13.37"
    assert describe(RECORD, 70) == "loss 4.6522  grad  0.279  12.3k tok/s  37% mm  max logit  13.37"
    assert describe(RECORD, 60) == "loss 4.6522  grad  0.279  12.3k tok/s  max logit  13.37"
    assert describe(RECORD, 45) == "loss 4.6522  12.3k tok/s  max logit  13.37"
    assert describe(RECORD, 30) == "loss 4.6522  12.3k tok/s"
    assert describe(RECORD, 5) == "loss 4.6522"
    for width in range(11, 130):
        assert len(describe(RECORD, width)) <= width
    assert describe(RECORD | {"loss": None}, 30).startswith("loss    nan")


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_terminal_of_any_width_keeps_the_rate_in_one_line(width):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", show(width, True, [RECORD]))
    line = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert len(line) <= width
    assert "10/300" in line and "12.3k tok/s" in line and ("━" in line) == (width >= 80) and "9:40" in line
    assert ("37% mm" in line) == (width >= 100)


def test_remaining_time_is_of_the_steps_alone():
    """290 steps of 2 s are left, however long a validation took between them: its seconds are in no record."""
    records = [RECORD | {"step": i} for i in range(9)] + [RECORD | {"validation_bits_per_byte": 1.9}]
    text = show(100, False, records)
    assert text.endswith("eta 9:40\n") and "step 10/300  validation 1.9000 bits per byte" in text


def test_a_skipped_step_says_which_check_failed():
    reasons = ["loss = 9.1 has z-score 12.30 > guard.loss_zscore = 8", "grad_norm = inf is not finite"]
    text = show(200, False, [RECORD | {"skipped": True, "skipped_so_far": 3, "skip_reasons": reasons}])
    assert f"step 10/300  SKIPPED, 3 so far: {reasons[0]}; {reasons[1]}" in text
