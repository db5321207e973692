"""The examples run, and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


def test_distillation_brings_the_encoders_attention_together(capsys):
    losses = runpy.run_path(str(EXAMPLES / "distil_two_encoders.py"))["main"]()
    assert losses[-1] < 0.8 * losses[0]
    assert "distillation loss" in capsys.readouterr().out
