"""Operations of a prediction, counted."""

from __future__ import annotations

import pytest

from app.config.compose import load_model_config
from app.inference.flops import count_flops


def test_operations_of_the_full_size() -> None:
    """About 6.0 TFLOP an image at 1008 px for one prompt, of which the trunk has 5.4."""
    assert count_flops(load_model_config("sam3")) == pytest.approx(6.0e12, rel=0.02)
    small, nano = (count_flops(load_model_config(name)) for name in ("small", "nano"))
    assert nano < small / 500
    assert small < 1.3e12
