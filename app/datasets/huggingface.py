"""A dataset of huggingface.co → COCO on this machine."""

from __future__ import annotations

from pathlib import Path

from app.config import HuggingFaceConfig
from app.errors import UserError


def fetch(config: HuggingFaceConfig, data: Path) -> Path:
    """The folder under `data` that holds the dataset as COCO; fetched where it is not there."""
    raise UserError("--hf-dataset: not there yet")
