"""Boxes given by two corners (x1 y1 x2 y2) where COCO has x y width height: the evidence."""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]
SLACK = 1.0  # pixels; exports round


def is_corners_of(box: Box, mask_xywh: Box) -> bool:
    """Return whether a box is its mask's when read as corners, and far from it as xywh."""
    x1, y1, x2, y2 = box
    return _overlap((x1, y1, x2 - x1, y2 - y1), mask_xywh) > 0.9 and _overlap(box, mask_xywh) < 0.8


def are_corners(boxes: Sequence[tuple[Box, tuple[int, int]]]) -> bool:
    """Return whether boxes without masks, each with its image's width and height, are corners.

    All of them are inside their images as corners, and at least a quarter leaves them as
    x y width height. Of true corners anywhere in an image, three in four do.
    """
    leaving = [leaves(box, size) for box, size in boxes]
    fitting = all(box[2] > box[0] and box[3] > box[1] and _fits(box, size) for box, size in boxes)
    return fitting and sum(leaving) >= max(1, len(boxes) / 4)


def leaves(box: Box, size: tuple[int, int]) -> bool:
    """Return whether an xywh box leaves its image by more than rounding does."""
    x, y, w, h = box
    return min(x, y) < -SLACK or x + w > size[0] + SLACK or y + h > size[1] + SLACK


def _fits(box: Box, size: tuple[int, int]) -> bool:
    return min(box) >= -SLACK and box[2] <= size[0] + SLACK and box[3] <= size[1] + SLACK


def _overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two xywh boxes; 0 where one has no width or height."""
    if min(*one[2:], *other[2:]) <= 0:
        return 0.0
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)
