"""Pixels of more than 8 bits → 8 bits, by the range of values that they have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Levels = tuple[float, float]  # the values that become 0 and 255
PART = 99.9  # percentile that a range holds: a few hot pixels must not darken the rest
MOST = 2**20  # pixels that a range is found from, evenly chosen


def find_levels(values: NDArray[Any]) -> Levels:
    """Return the range of an image's values, by one rule for training and prediction.

    Unsigned: 0 to 2**b - 1, the fewest bits b of 8 to 16 that hold the 99.9th percentile. Floats
    within 0 to 1: 1; within 0 to 255: 255. All else: the 0.1st to the 99.9th percentile.
    """
    flat = values.ravel()
    flat = flat[:: max(1, flat.size // MOST)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return 0.0, 1.0
    least, most = float(flat.min()), float(flat.max())
    if least >= 0 and flat.dtype.kind == "f" and most <= 255:
        return 0.0, 1.0 if most <= 1 else 255.0
    low, high = (float(value) for value in np.percentile(flat, [100 - PART, PART]))
    if least >= 0 and flat.dtype.kind in "ui" and high < 2**16:
        return 0.0, float(2 ** max(8, int(np.ceil(high)).bit_length()) - 1)
    return (low, high) if high > low else (low, low + 1)


def scale(values: NDArray[Any], levels: Levels) -> NDArray[np.uint8]:
    """Return values as 0 to 255, those outside of the range cut off; NaN becomes 0."""
    low, high = levels
    shares = (np.asarray(values, dtype=np.float32) - low) / (high - low or 1)
    shares = np.nan_to_num(shares, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    return np.asarray((shares * 255).round(), dtype=np.uint8)


def widest(one: Levels, other: Levels) -> Levels:
    """Return the range that holds both."""
    return min(one[0], other[0]), max(one[1], other[1])


def describe(levels: Levels) -> str:
    """Return what a range does to pixels, for people."""
    low, high = levels
    bits = int(high + 1).bit_length() - 1
    kind = f" of {bits} bits" if low == 0 and high == 2**bits - 1 and bits > 8 else ""
    return f"pixels{kind}: {low:g} to {high:g} become 0 to 255"
