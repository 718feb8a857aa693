"""COCO's run-length encoding in numpy: what predicts needs no pycocotools.

Runs go down the columns, one column after the other. `bounds` are the places where runs of set
pixels start and end, in turn: (2 R,) int64, rising.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rle = dict[str, Any]  # compressed COCO RLE {"size": [height, width], "counts": str}
Indices = NDArray[np.int64]
BITS = 5  # of a run's length in each character
LONGEST = 7  # characters of a run, at most: 35 bits; an image has fewer than 2**31 pixels


def from_bounds(bounds: Indices, height: int, width: int) -> Rle:
    """Encode the bounds of a mask (height, width)."""
    counts = np.diff(bounds, prepend=0, append=height * width)
    if counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [height, width], "counts": compress(counts)}


def to_bounds(rle: Rle) -> Indices:
    """Decode to bounds; raise ValueError where the runs do not fill an image of the RLE's size."""
    counts = decompress(rle["counts"])
    ends = np.cumsum(counts)
    height, width = rle["size"]
    if counts.min() < 0 or ends[-1] != height * width:
        raise ValueError(f"no RLE of {width} x {height} pixels")
    return ends[: len(ends) // 2 * 2]


def decode(rle: Rle) -> NDArray[np.bool_]:
    """Decode to a mask (height, width); raise ValueError as `to_bounds` does."""
    height, width = rle["size"]
    lengths = np.diff(to_bounds(rle), prepend=0, append=height * width)
    pixels = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return pixels.reshape(width, height).T


def decode_crop(rle: Rle) -> tuple[NDArray[np.bool_], int, int]:
    """Decode to the part (h, w) of a mask that holds all its pixels, and its left and top.

    What lies beside is never made: a hundred small masks of a large image take little memory.

    Raises:
        ValueError: as `to_bounds` does.
    """
    height, bounds = rle["size"][0], to_bounds(rle)
    if not len(bounds):
        return np.zeros((0, 0), dtype=bool), 0, 0
    left, right = int(bounds[0]) // height, (int(bounds[-1]) - 1) // height + 1
    lengths = np.diff(bounds, prepend=left * height, append=right * height)
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return columns[:, top:bottom].T, left, top


def area(rle: Rle) -> int:
    """Count the pixels that are set."""
    return covered(to_bounds(rle))


def covered(bounds: Indices) -> int:
    """Count the pixels that are set."""
    return int((bounds[1::2] - bounds[::2]).sum())


def merge(masks: Sequence[Indices], *, intersect: bool = False) -> Indices:
    """Return the union of N ≥ 1 masks, or their intersection; each by its bounds."""
    places = np.concatenate(masks)
    steps = np.concatenate([1 - 2 * (np.arange(len(bounds)) % 2) for bounds in masks])
    order = places.argsort(kind="stable")
    places, depth = places[order], steps[order].cumsum()
    last = np.append(places[1:] != places[:-1], True)[: len(places)]  # of those at one place
    inside = depth[last] >= (len(masks) if intersect else 1)
    return places[last][np.diff(inside, prepend=False)]


def iou(one: Indices, others: Sequence[Indices]) -> NDArray[np.float64]:
    """Return the IoU (N,) of one mask with each of N of the same image; 0 where both are empty."""
    if not others or not len(one):
        return np.zeros(len(others))
    before = np.concatenate([[0], (one[1::2] - one[::2]).cumsum()])  # area of the first n runs
    owners = np.repeat(np.arange(len(others)), [len(bounds) // 2 for bounds in others])
    starts = np.concatenate([bounds[::2] for bounds in others])
    ends = np.concatenate([bounds[1::2] for bounds in others])
    # Cumulative area at each run boundary: linear inside a run, constant between runs.
    steps = before.repeat(2)[1:-1]
    shared = np.interp(ends, one, steps) - np.interp(starts, one, steps)
    count = len(others)
    common = np.bincount(owners, shared, count)
    areas = np.bincount(owners, ends - starts, count)
    return common / np.maximum(before[-1] + areas - common, 1)


def compress(counts: Indices) -> str:
    """Encode lengths of runs of 0, 1, 0, … as COCO's string, five bits a character."""
    steps = counts.astype(np.int64)
    steps[3:] -= counts[1:-2]  # COCO stores most lengths as the step from the last but one
    magnitudes = np.where(steps < 0, ~steps, steps)
    limits = 1 << (BITS * np.arange(1, LONGEST) - 1)  # that n characters reach, their sign included
    lengths = 1 + np.searchsorted(limits, magnitudes, side="right")
    place = np.arange(lengths.max(initial=1))
    bits = (steps[:, None] >> (BITS * place)) & 31
    more = place < lengths[:, None] - 1
    characters = (bits + 48 + 32 * more).astype(np.uint8)[place < lengths[:, None]]
    return characters.tobytes().decode("ascii")


def decompress(text: str | bytes) -> Indices:
    """Decode COCO's string to lengths of runs of 0, 1, 0, …

    Five bits a character, the lowest first, bit 5 for "more"; from the fourth number on each is the
    difference to the one two before (`rleFrString`, cocoapi common/maskApi.c).

    Raises:
        ValueError: characters that the string does not use, a run cut short or beyond all images.
    """
    coded = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    values = np.frombuffer(coded, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(values & 32 == 0)
    lengths = np.diff(ends, prepend=-1)
    whole = len(ends) > 0 and ends[-1] == len(values) - 1
    if not whole or ((values < 0) | (values > 63)).any():
        raise ValueError("must have 'counts' in COCO's string form; these are damaged or cut short")
    if lengths.max(initial=0) > LONGEST:
        raise ValueError(f"must have 'counts' of at most {LONGEST} characters a number")
    starts = ends - lengths + 1
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    steps = np.add.reduceat((values & 31) << (BITS * place), starts)
    steps -= np.where(values[ends] & 16, 1 << (BITS * lengths), 0)  # the highest bit is the sign
    steps[1::2] = steps[1::2].cumsum()
    steps[2::2] = steps[2::2].cumsum()
    return steps
