"""Encode mask logits as RLE, without ever making a mask: its outline alone is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import Indices, Rle, decode, from_bounds

Floats = NDArray[np.float32]
CELLS = 2048  # of a mask that are looked at together: bounds the memory


class Axis(NamedTuple):
    """Hold where the target pixels of one axis lie between the S source pixels.

    Attributes:
        before, after: (T,) the shares of the source pixels before and behind each target pixel.
        starts: (S + 1,) index of the first target pixel at or behind each source pixel.
    """

    before: Floats
    after: Floats
    starts: Indices


def encode_masks(logits: Sequence[Floats], height: int, width: int) -> list[Rle]:
    """Return N mask logits (h, w) as N RLEs of an image (height, width).

    The order is upstream's: the logits are resized bilinearly, then thresholded at a probability of
    one half. Products and sums are rounded as in torch's `interpolate` (UpSampleKernel.cpp), on a
    CPU that fuses them: the masks are upstream's to the bit. On others, and where height and width
    add up to 128 at most, a pixel on the threshold, but for rounding, may fall to either side.
    """
    if not len(logits):
        return []
    source_height, source_width = logits[0].shape
    rows, columns = _axis(source_height, height), _axis(source_width, width)
    return [from_bounds(_find_bounds(mask, rows, columns), height, width) for mask in logits]


def _axis(source: int, target: int) -> Axis:
    scale = np.float32(source) / np.float32(target)
    places = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    places = places.clip(min=0)
    low = np.minimum(places.astype(np.int64), source - 1)
    after = (places - low).astype(np.float32)
    return Axis(1 - after, after, np.searchsorted(low, np.arange(source + 1)))


def _find_bounds(logits: Floats, rows: Axis, columns: Axis) -> Indices:
    """Return where the runs of the resized and thresholded logits (h, w) start and end.

    A column of the target changes its sign where a column of the logits, resized to it, does: once
    between two source pixels of different signs, and at the edge, to that of the next column's
    first source pixel. Two changes at one place are none.
    """
    inside = logits > 0
    height, width = len(rows.after), len(columns.after)
    ys = np.flatnonzero(inside.any(axis=1))
    top, bottom = (max(0, ys[0] - 1), ys[-1] + 2) if len(ys) else (0, 0)  # all else is outside
    inside = inside[top:bottom]
    either, both = inside[:-1] | inside[1:], inside[:-1] & inside[1:]
    either[:, :-1] |= either[:, 1:]
    both[:, :-1] &= both[:, 1:]
    # The cells between four source pixels that are not all on one side.
    mixed = np.flatnonzero(either > both) + top * logits.shape[1]
    changes = [_changes_at_edges(logits, columns) * height]
    for first in range(0, len(mixed), CELLS):
        changes.append(_changes_in_cells(logits, mixed[first : first + CELLS], rows, columns))
    places = np.concatenate(changes)
    places.sort()
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    odd = np.diff(firsts, append=len(places)) % 2 == 1
    places = places[firsts[odd]]
    return places[: np.searchsorted(places, height * width)]


def _changes_at_edges(logits: Floats, columns: Axis) -> Indices:
    """Return the target columns whose first source pixel is of another sign than the last before.

    Outside of the image all is negative.
    """
    edges = logits[[0, -1]]  # (2, w)
    if not (edges > 0).any():
        return np.zeros(0, dtype=np.int64)
    low = np.repeat(np.arange(logits.shape[1]), np.diff(columns.starts))
    high = np.minimum(low + 1, logits.shape[1] - 1)
    first, last = _fused(edges[:, low], columns.before, edges[:, high] * columns.after) > 0
    return np.flatnonzero(first != np.concatenate([[False], last[:-1]]))


def _changes_in_cells(logits: Floats, cells: Indices, rows: Axis, columns: Axis) -> Indices:
    """Return where target columns change their sign within cells between source pixels.

    Args:
        cells: index of the upper left pixel of each in the flat logits (h, w).
    """
    row, column = np.divmod(cells, logits.shape[1])
    right = np.minimum(column + 1, logits.shape[1] - 1)
    times = np.diff(columns.starts)[column]  # target columns of each cell
    cell = np.repeat(np.arange(len(cells)), times)
    x = np.arange(len(cell)) + (columns.starts[column] + times - times.cumsum())[cell]
    before, after = columns.before[x], columns.after[x]
    top, bottom = (
        _fused(logits[y, column][cell], before, logits[y, right][cell] * after).astype(np.float32)
        for y in (row, row + 1)
    )
    enters = bottom > 0
    changed = np.flatnonzero((top > 0) != enters)
    top, bottom, enters = top[changed], bottom[changed], enters[changed]
    cell, x = cell[changed], x[changed]
    # The sign changes once, because each rounding keeps the order: count the rows before.
    start = rows.starts[row][cell]
    length = np.diff(rows.starts)[row][cell]
    count = np.zeros(len(x), dtype=np.int64)
    for bit in reversed(range(int(length.max(initial=0)).bit_length())):
        more = count + (1 << bit)
        y = np.minimum(start + more, len(rows.after)) - 1
        is_before = (_fused(top, rows.before[y], bottom * rows.after[y]) > 0) != enters
        count = np.where(is_before & (more <= length), more, count)
    return x * len(rows.after) + start + count


def _fused(a: Floats, b: Floats, c: Floats) -> NDArray[np.float64]:
    """Return a * b + c, which is to be rounded once: a product of float32 fits a float64."""
    return np.multiply(a, b, dtype=np.float64) + c


def bool_masks(masks: Sequence[Rle], height: int, width: int) -> NDArray[np.bool_]:
    """Decode N RLEs to (N, height, width) bool."""
    if not masks:
        return np.zeros((0, height, width), dtype=bool)
    columns = np.stack([decode(mask).T for mask in masks])  # (N, width, height), as runs go
    return columns.transpose(0, 2, 1)


def to_rle(mask: NDArray[np.bool_]) -> Rle:
    """Return a mask (height, width) as RLE, by what of it is within its bounds."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return place(mask[:0, :0], 0, 0, *mask.shape)
    top, left = int(rows[0]), int(columns[0])
    return place(mask[top : rows[-1] + 1, left : columns[-1] + 1], left, top, *mask.shape)


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
