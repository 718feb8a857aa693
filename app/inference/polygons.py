"""Trace masks as polygons with holes, along the edges of their pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import Rle, decode_crop

Ring = list[list[int]]  # [x, y] pixels, the first point again at its end
Polygon = list[Ring]  # the outer ring, then its holes


def polygons(mask: Rle) -> list[Polygon]:
    """Return a polygon for each part of a mask whose pixels share sides; filled, they are the mask.

    Rings may touch at a corner and never cross, so each polygon is valid as OGC and RFC 7946 have
    it: the outer ring has a positive area with y taken upwards, holes have a negative one.
    """
    inside, x, y = decode_crop(mask)
    if not inside.size:
        return []
    crop = inside.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(crop, connectivity=4)
    parts = []
    for label in range(1, count):
        left, top, w, h = (int(side) for side in stats[label, :4])
        part = (labels[top : top + h, left : left + w] == label).astype(np.uint8)
        parts.append(_polygon(part, x + left, y + top))
    return parts


def _polygon(part: NDArray[np.uint8], left: int, top: int) -> Polygon:
    """Return the rings of a mask that is of one piece, moved by (left, top).

    On the mask at twice its size, a left half-pixel has an even and a right one an odd number, so
    that (number + 1) // 2 is the edge that it touches; for rows alike.
    """
    doubled = np.kron(part, np.ones((2, 2), dtype=np.uint8))
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    order = sorted(range(len(contours)), key=lambda index: tree[0][index][3] >= 0)  # outer first
    rings = [
        (contours[index][:, 0].astype(np.int64) + 1) // 2 + np.array([left, top]) for index in order
    ]
    return [_closed(ring, outer=number == 0) for number, ring in enumerate(rings)]


def _closed(ring: NDArray[np.int64], *, outer: bool) -> Ring:
    """Return the corners of a closed ring, in the direction that RFC 7946 asks for."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    ring = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    x, y = ring[:, 0], ring[:, 1]
    area = int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())
    if (area > 0) != outer:
        ring = ring[::-1]
    points: Ring = [*ring.tolist(), ring[0].tolist()]
    return points
