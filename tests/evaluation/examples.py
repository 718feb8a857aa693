"""Truth and results of three images, 120 x 100 pixels, and two classes, in a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from app.datasets.coco import Annotation, Category, Dataset, Image

IMAGES = tuple(Image(number, Path(f"/{number}.png"), 120, 100) for number in (1, 2, 3))
CLASSES = (Category(1, "a"), Category(2, "b"))
BOX = (10, 10, 20, 20)
Label = tuple[Any, ...]  # image, class, box xywh, and whether a crowd


def truth(*labels: Label) -> Dataset:
    """Objects whose masks fill their boxes."""
    annotations = tuple(
        Annotation(i, image, category, _floats(box), rle(box), box[2] * box[3], any(crowd))
        for i, (image, category, box, *crowd) in enumerate(labels, start=1)
    )
    return Dataset(IMAGES, annotations, CLASSES)


def found(image: int, category: int, box: Sequence[float], score: float) -> dict[str, Any]:
    """A COCO result whose mask fills its box."""
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(_floats(box)),
        "score": score,
        "segmentation": rle(box),
    }


def rle(box: Sequence[float]) -> dict[str, Any]:
    mask = np.zeros((100, 120), dtype=np.uint8)
    x, y, w, h = (int(side) for side in box)
    mask[y : y + h, x : x + w] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [100, 120], "counts": encoded["counts"].decode()}


def _floats(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, w, h = (float(side) for side in box)
    return x, y, w, h
