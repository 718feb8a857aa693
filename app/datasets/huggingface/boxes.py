"""Four numbers → a box in pixels: which convention they follow, by what fits the images.

A convention's name is Ultralytics': xyxy are two corners, xywh a corner and the size, cxcywh the
centre and the size; with n they are shares of the image's width and height, else pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CONVENTIONS = ("xywh", "xyxy", "cxcywh", "xywhn", "xyxyn", "cxcywhn")
PIXELS, SHARES = ("xywh", "xyxy"), ("cxcywhn", "xyxyn", "xywhn")  # that are in use
FITS = 0.99  # share of the boxes; what people draw is not all sound
SLACK = 0.01  # of the image's side, by which a box may leave it

Floats = NDArray[np.float64]


def to_xywh(boxes: Floats, sizes: Floats, convention: str) -> Floats:
    """Convert boxes to pixels: x, y of the top left corner, width, height.

    Args:
        boxes: (N, 4), in `convention`.
        sizes: (N, 2), width and height of each box's image, pixels.
    """
    if convention.endswith("n"):
        boxes = boxes * np.tile(sizes, 2)
    first, second = boxes[:, :2], boxes[:, 2:]
    if convention.startswith("xyxy"):
        second = second - first
    elif convention.startswith("cxcywh"):
        first = first - second / 2
    return np.hstack([first, second])


def decide(boxes: Floats, sizes: Floats, field: str) -> tuple[str, str]:
    """Return the convention that (N, 4) boxes follow, and the evidence for it, to be printed.

    One that the field's name says is taken where the boxes fit it.

    Raises:
        ValueError: no convention fits, or several do; says how many boxes fit which.
    """
    within = float((np.abs(boxes) <= 1 + SLACK).all(axis=1).mean())
    candidates = SHARES if within >= FITS else PIXELS if within <= 1 - FITS else ()
    fits = {name: _fitting(boxes, sizes, name) for name in candidates}
    shown = [f"{share:.0%} fit {name}" for name, share in fits.items()]
    evidence = f"of {len(boxes)} boxes " + ", ".join([f"{within:.0%} are within 0..1", *shown])
    good = [name for name, share in fits.items() if share >= FITS]
    named = [name for name in good if name.removesuffix("n") in field.lower().split("_")]
    if len(named or good) != 1:
        raise ValueError(evidence)
    return (named or good)[0], evidence


def _fitting(boxes: Floats, sizes: Floats, convention: str) -> float:
    """Return the share of the boxes that have an area and lie in their image."""
    xywh = to_xywh(boxes, sizes, convention)
    first, second = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    inside = (first >= -SLACK * sizes) & (second <= (1 + SLACK) * sizes) & (second > first)
    return float(inside.all(axis=1).mean())
