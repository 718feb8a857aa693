"""A finder for tests of what comes after it: plain colors on black, of any image, in no time."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from app.inference.detections import Detections
from app.inference.finder import Finder, Query
from app.inference.masks import place

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NEAR = 90  # of a channel, that a codec may lose


class ByColor(Finder):
    """Finds connected pixels of the colors that the prompts name.

    A score is 0.9, or 0.3 where the color is dark, as of something half hidden.
    """

    def __init__(self) -> None:
        self.prompts, self.threshold = tuple(COLORS), 0.5
        self.seen = 0

    def check_length(self, prompts: Sequence[str]) -> None:
        pass

    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        self.seen += len(images)
        return [self._one(image, query.prompts, query.threshold) for image in images]

    def _one(self, image: Image.Image, prompts: Sequence[str], threshold: float) -> Detections:
        pixels = np.asarray(image).astype(int)
        boxes, scores, ids, masks = [], [], [], []
        for number, prompt in enumerate(prompts):
            for share, score in ((1.0, 0.9), (0.5, 0.3)):
                color = np.array(COLORS[prompt]) * share
                inside = (np.abs(pixels - color) < NEAR * share * 0.6).all(axis=2)
                parts, labels, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
                for part in range(1, parts):
                    left, top, width, height, area = stats[part]
                    if area < 30 or score < threshold:
                        continue
                    crop = labels[top : top + height, left : left + width] == part
                    boxes.append([left, top, left + width, top + height])
                    masks.append(place(crop, left, top, *pixels.shape[:2]))
                    scores.append(score)
                    ids.append(number)
        order = np.argsort(-np.array(scores), kind="stable")
        found = Detections(
            np.array(boxes, dtype=np.float32).reshape(-1, 4),
            np.array(scores, dtype=np.float32),
            np.array(ids, dtype=np.int64),
            tuple(prompts),
            masks,
            image.width,
            image.height,
            max(scores, default=0.0),
        )
        return found.select(order)
