"""What an update and a prediction of the full size ask of the GPU: launches, and waits for it.

The host's time decides how fast a step is long before the GPU's does, and each wait keeps the host
from running ahead of it. The numbers are today's, and behind them stands what they shall become:
lower them with every change that spares some.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.null_gpu import NullGpu

LAUNCHES = {1: 10_560, 4: 13_640}  # of an update with 4 prompts an image, by the batch: 5,000
WAITS = 9  # of the host in an update: 50
PREDICTION = {"launches": 2_380, "waits": 4}  # with 1 prompt: 1,200 and 4


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_an_update(null_gpu: NullGpu, shapes: Path, batch: int) -> None:
    done = null_gpu.probe("update", str(shapes), "sam3", f"training.batch_size={batch}")
    assert done["launches"] <= LAUNCHES[batch]
    assert done["waits"] <= WAITS, done["places"]


@pytest.mark.slow
def test_a_prediction(null_gpu: NullGpu) -> None:
    done = null_gpu.probe("prediction", "sam3", 1)
    assert done["launches"] <= PREDICTION["launches"]
    assert done["waits"] <= PREDICTION["waits"], done["places"]
