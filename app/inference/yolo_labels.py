"""Lines of a YOLO label file, as Ultralytics trains on them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import Rle, decode_crop

Points = NDArray[np.float64]  # (points, xy), pixels


def label_line(
    number: int, mask: Rle | None, bbox_xywh: Sequence[float], width: int, height: int
) -> str:
    """Return `class x1 y1 x2 y2 …`, or `class cx cy w h` where there is no mask; 0..1.

    A mask becomes one polygon along its pixels' edges, its parts and holes joined by bridges of no
    width, as Ultralytics' converters join them: nothing of the mask is lost.

    Args:
        number: of the class, from 0.
        mask: of the image's size, with at least one pixel.
        bbox_xywh: pixels.
        width, height: of the image, pixels.
    """
    if mask is None:
        x, y, w, h = bbox_xywh
        points = np.array([[x + w / 2, y + h / 2], [w, h]])
    else:
        points = outline(mask)
    parts = (points / [width, height]).ravel()
    return " ".join([str(number), *(f"{part:.7g}" for part in parts)]) + "\n"


def outline(mask: Rle) -> Points:
    """Return one polygon along the edges of a mask's pixels, (points, xy), to be filled even-odd.

    On the mask at twice its size, a left half-pixel has an even and a right one an odd number, so
    that (number + 1) // 2 is the edge that it touches; for rows alike.
    """
    inside, left, top = decode_crop(mask)
    crop: NDArray[np.uint8] = inside.astype(np.uint8)
    doubled = np.kron(crop, np.ones((2, 2), dtype=np.uint8))
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(contour[:, 0].astype(np.int64) + 1) // 2 for contour in contours]
    rings.sort(key=len, reverse=True)
    joined = rings[0].astype(np.float64)
    for ring in rings[1:]:
        joined = _bridge(joined, ring.astype(np.float64))
    return joined + np.array([left, top])


def _bridge(polygon: Points, ring: Points) -> Points:
    """Join a ring to a polygon where they are nearest, there and back on one line."""
    distances = ((polygon[:, None] - ring[None]) ** 2).sum(axis=2)
    at, start = np.unravel_index(int(distances.argmin()), distances.shape)
    tour = np.roll(ring, -start, axis=0)
    return np.concatenate([polygon[: at + 1], tour, tour[:1], polygon[at:]])
