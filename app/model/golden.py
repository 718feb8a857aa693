"""What weights answer about a drawn image: they tell it, and whoever loads them can compare.

A file may be whole and its answers wrong: another library's version, a faulty device, a precision
that does not suffice. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDES = (160, 120)  # width, height
ANSWERS = 10  # the highest scores
NEAR = 0.05  # of log-odds, in one precision; machines add numbers up in other orders
NEAR_ACROSS = 0.5  # between two precisions


@dataclass(frozen=True)
class Golden:
    """Hold the answers.

    Attributes:
        prompts: that were asked.
        scores: 0..1, of the best queries over all prompts, the highest first.
        precision: in which they were computed: float32, bfloat16 or float16.
    """

    prompts: list[str]
    scores: list[float]
    precision: str

    def __post_init__(self) -> None:
        """Raise ValueError where these are no scores: they may come from anyone."""
        if not all(0 <= score <= 1 for score in self.scores) or len(self.scores) > ANSWERS:
            raise ValueError(f"golden: must be at most {ANSWERS} scores of 0 to 1")

    def difference(self, other: Golden) -> str:
        """Return what another answer to the same prompts differs in; empty where it does not.

        Log-odds are compared, as a score of a thousandth tells as much as one of a half.
        """
        if len(self.scores) != len(other.scores):
            return f"{len(other.scores)} scores in place of {len(self.scores)}"
        near = NEAR if self.precision == other.precision else NEAR_ACROSS
        for mine, theirs in zip(self.scores, other.scores, strict=True):
            if not abs(_log_odds(mine) - _log_odds(theirs)) <= near:
                return f"a score of {theirs:.3g} in place of {mine:.3g}"
        return ""


def draw() -> Image.Image:
    """Return the image: two things on a slope of gray, the same bytes everywhere."""
    width, height = SIDES
    rows, columns = np.mgrid[:height, :width]
    pixels = np.repeat(((rows + columns) // 2 + 60)[..., None], 3, axis=2).astype(np.uint8)
    pixels[(rows - 40) ** 2 + (columns - 50) ** 2 < 25**2] = (200, 40, 40)
    pixels[70:105, 90:140] = (40, 70, 200)
    return Image.fromarray(pixels)


def _log_odds(score: float) -> float:
    bounded = min(max(score, 1e-6), 1 - 1e-6)
    return math.log(bounded / (1 - bounded))
