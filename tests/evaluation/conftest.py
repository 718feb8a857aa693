"""A few images, and a run that finds something.

The run is from the project's own weights, configured in every way there is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.datasets.build import load_splits
from app.datasets.coco import Dataset
from app.datasets.synthetic.shapes import make_shapes
from tests.helpers import finish, once

CONFIGURED = {
    "model": {"name": "nano", "mask_points": 64},
    "transforms": "strong",
    "training": {"epochs": 1, "batch_size": 1, "grad_accum": 2},
    "evaluation": {"pictures": 1},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve images of shapes."""
    folder = tmp_path_factory.mktemp("twelve-shapes") / "set"
    make_shapes(folder, train=12, valid=1, fog=0, width=96, height=64, seed=1)
    return load_splits(folder).train


@pytest.fixture(scope="session")
def nano_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch, made with a file, flags and an override."""
    file = tmp_path_factory.mktemp("nano") / "mine.yaml"
    file.write_text(yaml.safe_dump({**CONFIGURED, "dataset": {"dir": str(shapes)}}))
    words = ["train", "--config", str(file), "--lr", "2e-6", "evaluation.off_prompts=2"]
    return once(tmp_path_factory, "nano-run", lambda out: finish(*words, "--output-dir", str(out)))
