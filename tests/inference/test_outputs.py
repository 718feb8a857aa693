from __future__ import annotations

import itertools

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from app.inference.outputs import coco_results, color_of, draw_detections
from app.inference.predictor import Detections


def _detections(**changes) -> Detections:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[20:30, 10:30] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    values = {
        "boxes_xyxy": np.array([[10, 20, 30, 30]], dtype=np.float32),
        "scores": np.array([0.75], dtype=np.float32),
        "prompt_ids": np.array([1]),
        "prompts": ("cat", "pothole"),
        "masks": [{"size": rle["size"], "counts": rle["counts"].decode()}],
        "width": 60,
        "height": 40,
    }
    return Detections(**{**values, **changes})


def test_an_overlay_changes_what_is_found_and_keeps_the_rest() -> None:
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    drawn = np.array(draw_detections(image, _detections()))
    expected = 100 * (1 - 0.45) + np.array(color_of(1)) * 0.45
    assert np.allclose(drawn[25, 20], expected, atol=1)  # inside the mask
    assert tuple(drawn[20, 12]) == color_of(1)  # on the box
    assert tuple(drawn[35, 50]) == (100, 100, 100)
    assert np.array_equal(np.array(image), np.full((40, 60, 3), 100))  # the original is untouched


def test_an_overlay_without_masks_or_detections() -> None:
    image = Image.new("RGB", (60, 40))
    assert tuple(np.array(draw_detections(image, _detections(masks=None)))[25, 20]) == (0, 0, 0)
    nothing = _detections(
        boxes_xyxy=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        prompt_ids=np.zeros(0, int),
        masks=[],
    )
    assert np.array_equal(np.array(draw_detections(image, nothing)), np.array(image))


def test_neighbouring_colors_differ() -> None:
    colors = [np.array(color_of(i)) for i in range(12)]
    assert all(abs(a - b).sum() > 60 for a, b in itertools.pairwise(colors))


def test_coco_results() -> None:
    detections = _detections()
    assert coco_results(detections, 7, [3, 5]) == [
        {
            "image_id": 7,
            "category_id": 5,
            "bbox": [10.0, 20.0, 20.0, 10.0],
            "score": 0.75,
            "segmentation": detections.masks[0],
        }
    ]
    assert "segmentation" not in coco_results(_detections(masks=None), 7, [3, 5])[0]
