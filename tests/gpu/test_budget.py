"""What an update and a prediction of the full size ask of the GPU: launches, and waits for it.

The host's time decides how fast a step is long before the GPU's does, and each wait keeps the host
from running ahead of it. The numbers are today's, and behind them stands what they shall become:
lower them with every change that spares some.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.null_gpu import NullGpu
from tests.helpers import MICRO

LAUNCHES = {1: 4_860, 4: 5_000}  # of an update with 4 prompts an image, by the batch: 5,000
OF_20_PROMPTS = 6_830  # of an update of one image
WAITS = 5  # of the host in an update: 50
PREDICTION = {"launches": 1_200, "waits": 4}  # with 1 prompt: 1,200 and 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_an_update(null_gpu: NullGpu, shapes: Path, batch: int) -> None:
    # As a run chooses where 80 GB are free.
    words = [f"training.batch_size={batch}", "model.activation_checkpointing=false"]
    done = null_gpu.probe("update", str(shapes), "sam3", *words)
    assert done["launches"] <= LAUNCHES[batch]
    assert done["waits"] <= WAITS, done["places"]


@pytest.mark.slow
def test_an_update_of_many_prompts(null_gpu: NullGpu, many_classes: Path) -> None:
    done = null_gpu.probe("update", str(many_classes), "sam3", "training.batch_size=1")
    assert done["launches"] <= OF_20_PROMPTS
    assert done["waits"] <= WAITS, done["places"]


@pytest.mark.slow
def test_a_prediction(null_gpu: NullGpu) -> None:
    done = null_gpu.probe("prediction", "sam3", 1)
    assert done["launches"] <= PREDICTION["launches"]
    assert done["waits"] <= PREDICTION["waits"], done["places"]


def test_cached_features_come_with_the_batch(null_gpu: NullGpu, shapes: Path) -> None:
    """Pinned: the host waits for nothing else than where they are computed."""
    computed = null_gpu.probe("update", str(shapes), "nano", "method=head", *MICRO)
    cached = null_gpu.probe("update_from_cached_features", str(shapes), *MICRO)
    assert cached["waits"] <= computed["waits"]
    assert sum(cached[name] for name in ("launches", "products", "fills")) < computed["launches"]
