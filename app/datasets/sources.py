"""Where a dataset comes from → a folder on this machine that `build.load_splits` reads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from app.config import DatasetConfig, ShapesConfig
from app.datasets import huggingface, roboflow
from app.datasets.build import shapes_dataset

HOME = Path(__file__).resolve().parents[2]
# Of the project where it can be written; in an image it cannot, and the working folder is mounted.
DATA = (HOME if os.access(HOME, os.W_OK) else Path.cwd()) / "data"


def fetch(config: DatasetConfig, seed: int, data: Path = DATA) -> Path:
    """The folder of the dataset that `config` names, fetched or drawn under `data` where needed.

    Raises:
        UserError: it is not to be had; says why and what to do.
    """
    if config.dir is not None:
        return Path(config.dir)
    if config.huggingface.name is not None:
        return huggingface.fetch(config.huggingface, data)
    if config.roboflow is not None:
        return roboflow.fetch(config.roboflow, data)
    folder = data / f"shapes-{_shapes_name(config.shapes, seed)}"
    return shapes_dataset(folder, **config.shapes.model_dump(), seed=seed)


def _shapes_name(shapes: ShapesConfig, seed: int) -> str:
    """Short and safe as a folder's name; others for other settings."""
    settings = json.dumps({**shapes.model_dump(), "seed": seed}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:12]
