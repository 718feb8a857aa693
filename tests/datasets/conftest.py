"""A small sound COCO dataset to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]  # columns 10..19, rows 5..14 of a 40 x 30 image


def sound_document() -> dict[str, Any]:
    """Two images; a box with a polygon, an uncompressed RLE alone, a box alone."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [10, 5, 10, 10],
                "area": 100,
                "iscrowd": 0,
                "segmentation": [list(SQUARE)],
            },
            {
                "id": 2,
                "image_id": 1,
                "category_id": 4,
                "segmentation": {"size": [30, 40], "counts": [32, 3, 27, 3, 1135]},
                "iscrowd": 1,
            },
            {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 5, 6], "segmentation": []},
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def noise(seed: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image like no other: those of other seeds are no near-duplicates."""
    pixels = np.random.default_rng(list(seed.encode())).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def document() -> dict[str, Any]:
    return sound_document()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a document and its images into a folder under tmp_path; returns the folder."""

    def save_to(document: Any, name: str = "set") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in document["images"]:
            noise(f"{name}/{image['file_name']}").save(folder / image["file_name"])
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
        return folder

    return save_to
