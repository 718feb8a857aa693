"""Shapes as people draw them → run-length masks; nothing unchecked reaches pycocotools.

A mask is a compressed COCO RLE {"size": [height, width], "counts": str}. Coordinates are pixels,
continuous: the image spans 0..width and 0..height, pixel (0, 0) has its centre at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.geometry import is_number, polygon_fault

Rle = dict[str, Any]


def polygon_mask(polygon: object, width: int, height: int) -> Rle:
    """Fill a flat list [x1, y1, x2, …] even-odd; return its mask, cut off at the image.

    Raises:
        ValueError: it is no such list, or covers no pixel; says why.
    """
    if fault := polygon_fault(polygon, width, height):
        raise ValueError(fault)
    points = _clip(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), width, height)
    if len(points) < 3:
        raise ValueError(f"lies outside its image of {width} x {height} pixels; redraw it")
    return _covering(coco_mask.frPyObjects([points.ravel().tolist()], height, width)[0])


def closes(line: object) -> bool:
    """Return whether the ends of a flat line [x1, y1, x2, …] meet: it was drawn as an outline.

    A hand that clicks near its first point leaves a gap, of 2 % of the line's length at most.
    """
    if not isinstance(line, list) or len(line) < 8 or len(line) % 2:
        return False
    if not all(map(is_number, line)):
        return False
    points = np.asarray(line, dtype=np.float64).reshape(-1, 2)
    length = np.linalg.norm(np.diff(points, axis=0), axis=1).sum()
    return bool(np.linalg.norm(points[0] - points[-1]) <= length / 50)


def ellipse_mask(
    center: tuple[object, object],
    radii: tuple[object, object],
    width: int,
    height: int,
    angle: object = 0.0,
) -> Rle:
    """Return the mask of the pixels whose centers lie in an ellipse.

    Args:
        center, radii: x and y, pixels.
        angle: of the first radius to the x axis, clockwise as seen, radians.

    Raises:
        ValueError: a number is not finite, a radius not above 0, or it covers no pixel.
    """
    x, y, rx, ry, turn = (_finite(value) for value in (*center, *radii, angle))
    if rx <= 0 or ry <= 0:
        raise ValueError("must have a radius above 0; delete or redraw it")
    reach = max(rx, ry)
    left, right = (math.floor(min(max(side, 0), width)) for side in (x - reach, x + reach + 1))
    top, bottom = (math.floor(min(max(side, 0), height)) for side in (y - reach, y + reach + 1))
    dx = np.arange(left, right) + 0.5 - x  # (columns,)
    dy = (np.arange(top, bottom) + 0.5 - y)[:, None]  # (rows, 1)
    along = (dx * math.cos(turn) + dy * math.sin(turn)) / rx
    across = (dy * math.cos(turn) - dx * math.sin(turn)) / ry
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = along**2 + across**2 <= 1
    return encode(mask)


def encode(mask: NDArray[np.bool_]) -> Rle:
    """Return the RLE of a (height, width) mask; raise ValueError where it covers no pixel."""
    return _covering(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def union(masks: Sequence[Rle]) -> Rle:
    """Return the mask of all pixels of masks of one size."""
    return _covering(coco_mask.merge(list(masks)))


def without(mask: Rle, holes: Sequence[Rle]) -> Rle:
    """Return the mask of the pixels of `mask` that are in none of the holes."""
    inside, cut = (coco_mask.decode(part).astype(bool) for part in (mask, union(holes)))
    return encode(inside & ~cut)


def placed_mask(pixels: NDArray[np.bool_], left: int, top: int, width: int, height: int) -> Rle:
    """Return the mask (height, width) of a part's pixels whose first is at (left, top).

    What leaves the image is cut off.
    """
    rows, columns = pixels.shape
    mask = np.zeros((height, width), dtype=bool)
    x, y = max(left, 0), max(top, 0)
    right, bottom = min(left + columns, width), min(top + rows, height)
    if x < right and y < bottom:
        mask[y:bottom, x:right] = pixels[y - top : bottom - top, x - left : right - left]
    return encode(mask)


def turned_box(
    box_xywh: Sequence[float], degrees: float, around: tuple[float, float], width: int, height: int
) -> Rle:
    """Return the mask of a box that is turned around a point, clockwise as seen; pixels."""
    x, y, w, h = box_xywh
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
    polygon = []
    for dx, dy in ((cx - around[0], cy - around[1]) for cx, cy in corners):
        polygon += [around[0] + dx * cos - dy * sin, around[1] + dx * sin + dy * cos]
    return polygon_mask(polygon, width, height)


def _covering(rle: Any) -> Rle:
    if not coco_mask.area(rle):
        raise ValueError("covers no pixel; delete it")
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if counts else ""}


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError("must have finite numbers, in pixels, for its centre and radii")
    return float(value)


def _clip(points: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """Cut a polygon (points, xy) off at the image (Sutherland and Hodgman, 1974)."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = sign * (points[:, axis] - limit)  # >= 0 inside
        if (depth >= 0).all():
            continue
        kept = []
        for index in range(len(points)):
            before, here = depth[index - 1], depth[index]
            if (before >= 0) != (here >= 0):
                share = before / (before - here)
                kept.append(points[index - 1] + share * (points[index] - points[index - 1]))
            if here >= 0:
                kept.append(points[index])
        points = np.array(kept).reshape(-1, 2)
        if not len(points):
            break
    return points
