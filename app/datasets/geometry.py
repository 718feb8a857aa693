"""Boxes and masks of a COCO JSON, proved sound before anything trusts them.

pycocotools segfaults or reads foreign memory on malformed masks (NaN or huge coordinates, runs
that do not fill the mask), so this module proves each mask safe without calling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import decompress

MAX_SIDE = 32768  # pixels; pycocotools' 32-bit run lengths overflow at 65,536 squared
MAX_OUTLINE = 2_000_000  # pixels; pycocotools allocates about 80 bytes a pixel, unchecked
LARGEST_NUMBER = 1e12  # anything beyond is a fault in the export, not a measurement

Problem = tuple[str, str]  # kind of fault, and its remedy


def box_fault(box: object, width: int, height: int) -> Problem | None:
    """Return what is wrong with an xywh box (pixels); None where it is sound, once clipped."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "bbox", "must be four finite numbers [x, y, width, height] in pixels"
    if box[2] <= 0 or box[3] <= 0:
        remedy = "must have a width and a height above 0; delete this annotation or redraw it"
        return "bbox empty", remedy
    *_, visible_width, visible_height = clip_box(box, width, height)
    if visible_width <= 0 or visible_height <= 0:
        remedy = f"lies outside its image of {width} x {height} pixels; delete or redraw it"
        return "bbox outside", remedy
    return None


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Clip an xywh box (pixels) to the image; width or height <= 0 where nothing is left."""
    x, w = _clip_span(box[0], box[2], width)
    y, h = _clip_span(box[1], box[3], height)
    return x, y, w, h


def _clip_span(start: float, length: float, limit: int) -> tuple[float, float]:
    if start >= 0 and start + length <= limit:
        return float(start), float(length)  # untouched: subtracting again would lose digits
    low, high = max(start, 0.0), min(start + length, limit)
    return float(low), float(high - low)


def mask_fault(segmentation: object, width: int, height: int) -> Problem | None:
    """Return what is wrong with a COCO segmentation; None where pycocotools can read it safely."""
    if isinstance(segmentation, dict):
        fault = rle_fault(segmentation, width, height)
        return ("RLE", fault) if fault else None
    if not isinstance(segmentation, list):
        return "segmentation", "must be a list of polygons or an RLE object"
    faults = (polygon_fault(polygon, width, height) for polygon in segmentation)
    fault = next((fault for fault in faults if fault), None)
    return ("polygon", fault) if fault else None


def polygon_fault(polygon: object, width: int, height: int) -> str | None:
    """Return what is wrong with a flat polygon [x1, y1, x2, …] (pixels); None where it is sound."""
    if not isinstance(polygon, list) or not all(map(is_number, polygon)):
        return "must be a list of polygons, each a flat list of finite numbers [x1, y1, x2, …]"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers: must be pairs of x and y, three or more"
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)  # (points, xy), pixels
    size = np.array([width, height])
    if (points < -size).any() or (points > 2 * size).any():
        return f"leaves its image of {width} x {height} pixels by more than the image's own size"
    outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        return f"has an outline of {outline:.0f} pixels: no shape is so long; redraw it"
    return None


def rle_fault(rle: dict[str, Any], width: int, height: int) -> str | None:
    size = rle.get("size")
    if not isinstance(size, list) or not all(map(is_side, size)) or size != [height, width]:
        return f"must have the image's size [height, width] = [{height}, {width}]"
    try:
        decode_counts(rle.get("counts"), width * height)
    except ValueError as error:
        return str(error)
    return None


def decode_counts(counts: object, pixels: int) -> NDArray[np.int64]:
    """Decode run lengths, background first, of an uncompressed (list) or compressed (string) RLE.

    Args:
        counts: the RLE's `counts`, from any source.
        pixels: height x width, which the runs must sum to.

    Raises:
        ValueError: they are no such runs; says why.
    """
    if isinstance(counts, str):
        runs = decompress(counts)
    elif isinstance(counts, list) and all(is_int(c) and 0 <= c <= pixels for c in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("must have 'counts' that are a list of run lengths, or COCO's string")
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(f"must have 'counts' whose runs sum to height x width = {pixels}")
    return runs


def is_absent(value: object) -> bool:
    """Return whether a bbox or a segmentation is left out, in either way that exports do it."""
    return value is None or value == []


def is_side(value: object) -> TypeGuard[int]:
    return is_int(value) and 1 <= value <= MAX_SIDE


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether it is finite and of a sane size; NaN fails every comparison."""
    return (isinstance(value, float) or is_int(value)) and abs(value) < LARGEST_NUMBER


def to_number(text: str | None) -> float:
    """Return the number that a text of labels says; NaN, which every check refuses, for none."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def to_side(text: str | None) -> int:
    """Return the side in pixels that a text says; 0, which is passed over, where it is none."""
    text = (text or "").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else 0
