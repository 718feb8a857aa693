"""Detections → files that people and programs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from app.datasets.overlay import color_of, draw_objects
from app.inference.predictor import Detections


def draw_detections(image: Image.Image, detections: Detections) -> Image.Image:
    """Overlay of mask, box, prompt and score on a copy of the image."""
    labels = [
        f"{detections.prompts[prompt]} {score:.2f}"
        for prompt, score in zip(detections.prompt_ids, detections.scores, strict=True)
    ]
    colors = [color_of(int(prompt)) for prompt in detections.prompt_ids]
    return draw_objects(image, detections.boxes_xyxy, detections.masks, labels, colors)


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO results of one image.

    Args:
        category_ids: the category of each prompt, in the order of `detections.prompts`.
    """
    results = []
    for index in range(len(detections)):
        x1, y1, x2, y2 = (float(side) for side in detections.boxes_xyxy[index])
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[int(detections.prompt_ids[index])],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(detections.scores[index]),
        }
        if detections.masks is not None:
            result["segmentation"] = detections.masks[index]
        results.append(result)
    return results
