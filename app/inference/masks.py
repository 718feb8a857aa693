"""Masks of single objects: enlarged where they are, and run-length encoded in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

Rle = dict[str, Any]  # compressed COCO RLE {"size": [height, width], "counts": str}
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
# Sums of four products in another order differ by less than this share of the largest of them.
DOUBT = 1e-6


class Axis(NamedTuple):
    """For each target pixel the two source pixels that it lies between, and the second's share."""

    low: Indices
    high: Indices
    share: Floats


def encode_masks(logits: Tensor, height: int, width: int) -> list[Rle]:
    """Mask logits (N, h, w) → N RLEs of the image's size.

    Upstream's order: the logits are resized, then thresholded at a probability of one half. Only
    where a mask can be is it computed, and the result is the same bit for bit: a mask with a pixel
    so near the threshold that the order of the sums could decide it goes the plain way.
    """
    values = logits.float().cpu().numpy()
    rows, columns = _axis(values.shape[1], height), _axis(values.shape[2], width)
    return [_encode(mask, rows, columns) for mask in values]


def bool_masks(masks: Sequence[Rle], height: int, width: int) -> NDArray[np.bool_]:
    """N RLEs → (N, height, width)."""
    decoded = coco_mask.decode(list(masks)) if masks else np.zeros((height, width, 0))
    return decoded.astype(bool).transpose(2, 0, 1)


def _encode(logits: Floats, rows: Axis, columns: Axis) -> Rle:
    height, width = len(rows.low), len(columns.low)
    positive = logits > 0
    ys, xs = np.flatnonzero(positive.any(axis=1)), np.flatnonzero(positive.any(axis=0))
    if not len(ys):
        return place(np.zeros((0, 0), dtype=bool), 0, 0, height, width)
    down, across = _reached(rows, ys[0], ys[-1]), _reached(columns, xs[0], xs[-1])
    if (down.stop - down.start) * (across.stop - across.start) > height * width / 2:
        return place(plain_mask(logits, height, width), 0, 0, height, width)  # nothing to save
    resized, peak = _resize(logits, rows, columns, down, across)
    if np.abs(resized).min(initial=np.inf) < DOUBT * peak:
        return place(plain_mask(logits, height, width), 0, 0, height, width)
    return place(resized > 0, across.start, down.start, height, width)


def plain_mask(logits: Floats, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of logits (h, w), as upstream's Sam3Processor makes it."""
    tensor = torch.from_numpy(np.ascontiguousarray(logits))[None, None]
    resized = F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)
    mask: NDArray[np.bool_] = (resized[0, 0] > 0).numpy()
    return mask


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
    tall = crop.shape[0] + 2
    framed = np.zeros((crop.shape[1], tall), dtype=bool)  # by columns, as RLE runs
    framed[:, 1:-1] = crop.T
    flat = framed.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), tall)
    bounds = (column + left) * height + row + top  # starts and ends of runs, in turn
    again = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])  # a run that goes on in the next column
    bounds = np.delete(bounds, np.concatenate([2 * again + 1, 2 * again + 2]))
    counts = np.diff(bounds, prepend=0, append=height * width).tolist()
    if counts[-1] == 0:
        counts.pop()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
