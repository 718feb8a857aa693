"""The null GPU, and images for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.datasets.synthetic.shapes import make_shapes
from tests.gpu.null_gpu import NullGpu, build
from tests.helpers import once


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NullGpu]:
    """A GPU that computes nothing, seen by a process of its own."""
    gpu = NullGpu(once(tmp_path_factory, "null-gpu-library", build))
    yield gpu
    gpu.close()


@pytest.fixture(scope="session")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 25 classes, each of which is asked for as many prompts as a run takes."""
    drawn = {"train": 12, "valid": 1, "width": 96, "height": 64, "seed": 1, "label_by": "both"}
    drawn["kinds"] = ["circle", "rectangle", "triangle", "star", "ring"]
    drawn["colors"] = ["red", "green", "blue", "yellow", "orange"]
    return once(tmp_path_factory, "many-classes", lambda folder: make_shapes(folder, **drawn))
