"""Count scores: those of the validation images, which weights tell, beside those of service.

Needs no torch and runs on Python 3.10, as the runtime of an exported folder does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 20  # of scores, 0..1, all of one width


@dataclass(frozen=True)
class ScoreCounts:
    """Count the detections on images that were asked for every class, by class and score.

    Attributes:
        images: how many.
        found: class → images that show it, as the model says.
        counts: class → BINS numbers of its detections, from the lowest scores to the highest.
    """

    images: int
    found: dict[str, int]
    counts: dict[str, list[int]]

    def __post_init__(self) -> None:
        """Raise ValueError where these are no counts: they may come from anyone."""
        rows = [*self.counts.values()]
        numbers = [self.images, *self.found.values(), *(number for row in rows for number in row)]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("scores: must be whole numbers of 0 or more")
        if any(len(row) != BINS for row in rows):
            raise ValueError(f"scores: must be {BINS} numbers for each class")


def bins_of(scores: ArrayLike) -> NDArray[np.int64]:
    """Return the bin of each score, 0..1; 1 itself is in the last."""
    numbers = np.asarray(scores, dtype=np.float64) * BINS
    return np.asarray(numbers.astype(np.int64).clip(0, BINS - 1))


def count_scores(
    images: int,
    classes: Mapping[int, str],
    results: Sequence[Mapping[str, Any]],
    threshold: float,
) -> ScoreCounts:
    """Count COCO results that score above the threshold; classes without any are left out.

    Args:
        images: that were asked for every class.
        classes: category id → class.
    """
    counts: dict[str, list[int]] = {}
    shown: dict[str, set[int]] = {}
    for result in results:
        if result["score"] > threshold:
            name = classes[result["category_id"]]
            counts.setdefault(name, [0] * BINS)[int(bins_of(result["score"]))] += 1
            shown.setdefault(name, set()).add(result["image_id"])
    return ScoreCounts(images, {name: len(ids) for name, ids in shown.items()}, counts)
