"""Encode mask logits as RLE; they are enlarged only where the mask can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import Indices, Rle, decode, from_bounds

Floats = NDArray[np.float32]
# Sums of four products in another order differ by less than this share of the largest of them.
ROUNDING = 1e-6


class Axis(NamedTuple):
    """Hold the two source pixels that each target pixel lies between, and the second's share."""

    low: Indices
    high: Indices
    share: Floats


def encode_masks(logits: Floats, height: int, width: int) -> list[Rle]:
    """Return mask logits (N, h, w) as N RLEs of an image (height, width).

    The order is upstream's: the logits are resized bilinearly, then thresholded at a probability of
    one half. A pixel that is on the threshold, but for rounding, may fall to either side.
    """
    rows, columns = _axis(logits.shape[1], height), _axis(logits.shape[2], width)
    masks = []
    for mask in logits:
        down, across = _reach(mask, rows, columns)
        resized, _ = _resize(mask, rows, columns, down, across)
        masks.append(place(resized > 0, across.start, down.start, height, width))
    return masks


def encode_clear_masks(logits: Floats, height: int, width: int) -> list[Rle | None]:
    """Return what `encode_masks` does, but None where it would be of no use.

    That is a mask with a pixel so near to the threshold that the order of the sums could decide
    it, and a mask that may fill more than half of the image, where nothing is saved. All others
    are upstream's to the bit.
    """
    rows, columns = _axis(logits.shape[1], height), _axis(logits.shape[2], width)
    masks: list[Rle | None] = []
    for mask in logits:
        down, across = _reach(mask, rows, columns)
        rle = None
        if (down.stop - down.start) * (across.stop - across.start) <= height * width / 2:
            resized, peak = _resize(mask, rows, columns, down, across)
            if np.abs(resized).min(initial=np.inf) >= ROUNDING * peak:
                rle = place(resized > 0, across.start, down.start, height, width)
        masks.append(rle)
    return masks


def bool_masks(masks: Sequence[Rle], height: int, width: int) -> NDArray[np.bool_]:
    """Decode N RLEs to (N, height, width) bool."""
    if not masks:
        return np.zeros((0, height, width), dtype=bool)
    columns = np.stack([decode(mask).T for mask in masks])  # (N, width, height), as runs go
    return columns.transpose(0, 2, 1)


def _reach(logits: Floats, rows: Axis, columns: Axis) -> tuple[slice, slice]:
    """Return the target rows and columns that positive logits (h, w) take part in; maybe none."""
    positive = logits > 0
    ys, xs = np.flatnonzero(positive.any(axis=1)), np.flatnonzero(positive.any(axis=0))
    if not len(ys):
        return slice(0, 0), slice(0, 0)
    return _reached(rows, ys[0], ys[-1]), _reached(columns, xs[0], xs[-1])


def _axis(source: int, target: int) -> Axis:
    scale = np.float32(source) / np.float32(target)
    places = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    places = places.clip(min=0)
    low = np.minimum(places.astype(np.int64), source - 1)
    return Axis(low, np.minimum(low + 1, source - 1), (places - low).astype(np.float32))


def _reached(axis: Axis, first: int, last: int) -> slice:
    """Return the target pixels that source pixels first…last take part in."""
    start, stop = np.searchsorted(axis.high, first), np.searchsorted(axis.low, last, side="right")
    return slice(int(start), int(stop))


def _resize(
    logits: Floats, rows: Axis, columns: Axis, down: slice, across: slice
) -> tuple[Floats, float]:
    """Resize logits (h, w) bilinearly, only the target's part (down, across).

    Returns:
        That part, and the largest absolute logit that takes part in it.
    """
    top, bottom, y_share = rows.low[down], rows.high[down], rows.share[down]
    left, right, x_share = columns.low[across], columns.high[across], columns.share[across]
    if not len(top) or not len(left):
        return np.zeros((len(top), len(left)), dtype=np.float32), 0.0
    band = logits[top[0] : bottom[-1] + 1, left[0] : right[-1] + 1].T  # (w, h): runs go down
    tall = _between(band[:, top - top[0]], band[:, bottom - top[0]], y_share)
    resized = _between(tall[left - left[0]], tall[right - left[0]], x_share[:, None])
    return resized.T, float(np.abs(band).max())


def _between(low: Floats, high: Floats, share: Floats) -> Floats:
    """Interpolate linearly; the result takes the memory of `high`."""
    high -= low
    high *= share
    high += low
    return high


def place(crop: NDArray[np.bool_], left: int, top: int, height: int, width: int) -> Rle:
    """Encode a mask (h, w) that lies at (left, top) in an image that is empty elsewhere."""
    return from_bounds(bounds_of(crop, left, top, height), height, width)


def bounds_of(crop: NDArray[np.bool_], left: int, top: int, height: int) -> Indices:
    """Return where runs of a mask (h, w) start and end that lies at (left, top) in an image.

    Args:
        height: of the image; a run may go on from the last pixel of a column to the next one's
            first.
    """
    tall = crop.shape[0] + 2
    framed = np.zeros((crop.shape[1], tall), dtype=bool)  # by columns, as RLE runs
    framed[:, 1:-1] = crop.T
    flat = framed.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), tall)
    bounds = (column + left) * height + row + top  # starts and ends of runs, in turn
    again = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])  # a run that goes on in the next column
    return np.delete(bounds, np.concatenate([2 * again + 1, 2 * again + 2]))
