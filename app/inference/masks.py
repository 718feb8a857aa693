"""Masks of single objects: enlarged where they are, and run-length encoded in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.inference.rle import Indices, Rle, decode, from_bounds

Floats = NDArray[np.float32]
Whole = Callable[[Floats, int, int], NDArray[np.bool_]]  # logits (h, w), height, width → the mask
# Sums of four products in another order differ by less than this share of the largest of them.
DOUBT = 1e-6


class Axis(NamedTuple):
    """For each target pixel the two source pixels that it lies between, and the second's share."""

    low: Indices
    high: Indices
    share: Floats


def encode_masks(logits: Floats, height: int, width: int, plain: Whole | None = None) -> list[Rle]:
    """Mask logits (N, h, w) → N RLEs of the image's size.

    Upstream's order: the logits are resized, then thresholded at a probability of one half. Only
    where a mask can be is it computed.

    Args:
        plain: upstream's own way, for a mask with a pixel so near the threshold that the order of
            the sums could decide it, and for one that fills most of the image: the result is its
            own bit for bit. None: all is computed here, and such a pixel may fall otherwise.
    """
    rows, columns = _axis(logits.shape[1], height), _axis(logits.shape[2], width)
    return [_encode(mask, rows, columns, plain) for mask in logits]


def bool_masks(masks: Sequence[Rle], height: int, width: int) -> NDArray[np.bool_]:
    """N RLEs → (N, height, width)."""
    if not masks:
        return np.zeros((0, height, width), dtype=bool)
    columns = np.stack([decode(mask).T for mask in masks])  # as the runs go: no mask is turned
    return columns.transpose(0, 2, 1)


def _encode(logits: Floats, rows: Axis, columns: Axis, plain: Whole | None) -> Rle:
    height, width = len(rows.low), len(columns.low)
    positive = logits > 0
    ys, xs = np.flatnonzero(positive.any(axis=1)), np.flatnonzero(positive.any(axis=0))
    if not len(ys):
        return place(np.zeros((0, 0), dtype=bool), 0, 0, height, width)
    down, across = _reached(rows, ys[0], ys[-1]), _reached(columns, xs[0], xs[-1])
    most = (down.stop - down.start) * (across.stop - across.start) > height * width / 2
    if plain is not None and most:
        return place(plain(logits, height, width), 0, 0, height, width)  # nothing to save
    resized, peak = _resize(logits, rows, columns, down, across)
    if plain is not None and np.abs(resized).min(initial=np.inf) < DOUBT * peak:
        return place(plain(logits, height, width), 0, 0, height, width)
    return place(resized > 0, across.start, down.start, height, width)


def _axis(source: int, target: int) -> Axis:
    scale = np.float32(source) / np.float32(target)
    places = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    places = places.clip(min=0)
    low = np.minimum(places.astype(np.int64), source - 1)
    return Axis(low, np.minimum(low + 1, source - 1), (places - low).astype(np.float32))


def _reached(axis: Axis, first: int, last: int) -> slice:
    """The target pixels that source pixels first…last take part in."""
    start, stop = np.searchsorted(axis.high, first), np.searchsorted(axis.low, last, side="right")
    return slice(int(start), int(stop))


def _resize(
    logits: Floats, rows: Axis, columns: Axis, down: slice, across: slice
) -> tuple[Floats, float]:
    """The part (down, across) of the logits resized bilinearly, and the largest logit it is of."""
    top, bottom, y_share = rows.low[down], rows.high[down], rows.share[down]
    left, right, x_share = columns.low[across], columns.high[across], columns.share[across]
    if not len(top) or not len(left):
        return np.zeros((len(top), len(left)), dtype=np.float32), 0.0
    band = logits[top[0] : bottom[-1] + 1, left[0] : right[-1] + 1].T  # (w, h): runs go down
    tall = _between(band[:, top - top[0]], band[:, bottom - top[0]], y_share)
    resized = _between(tall[left - left[0]], tall[right - left[0]], x_share[:, None])
    return resized.T, float(np.abs(band).max())


def _between(low: Floats, high: Floats, share: Floats) -> Floats:
    high -= low
    high *= share
    high += low
    return high


def place(crop: NDArray[np.bool_], left: int, top: int, height: int, width: int) -> Rle:
    """The RLE of a mask (h, w) that lies at (left, top) in an image that is empty elsewhere."""
    return from_bounds(bounds_of(crop, left, top, height), height, width)


def bounds_of(crop: NDArray[np.bool_], left: int, top: int, height: int) -> Indices:
    """Where the runs of a mask (h, w) start and end, which lies so in an image of that height."""
    tall = crop.shape[0] + 2
    framed = np.zeros((crop.shape[1], tall), dtype=bool)  # by columns, as RLE runs
    framed[:, 1:-1] = crop.T
    flat = framed.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), tall)
    bounds = (column + left) * height + row + top  # starts and ends of runs, in turn
    again = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])  # a run that goes on in the next column
    return np.delete(bounds, np.concatenate([2 * again + 1, 2 * again + 2]))
