"""Cut a large image into overlapping tiles, which show small things at the model's scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True)
class Tile:
    """Hold a part of an image; pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.width, self.top + self.height

    def shared(self, other: Tile) -> Tile | None:
        """Return the part that both tiles see; None where there is none."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right = min(self.left + self.width, other.left + other.width)
        bottom = min(self.top + self.height, other.top + other.height)
        if right <= left or bottom <= top:
            return None
        return Tile(left, top, right - left, bottom - top)

    def cuts(self, box_xyxy: Sequence[float], width: int, height: int, margin: float) -> bool:
        """Return whether a box reaches an edge of the tile that is not an edge of the image.

        Args:
            box_xyxy: pixels of the image.
            width, height: of the image, pixels.
            margin: pixels from the edge that count as reaching it.
        """
        left, top, right, bottom = self.box_xyxy
        reached = np.array(
            [
                box_xyxy[0] - left <= margin and left > 0,
                box_xyxy[1] - top <= margin and top > 0,
                right - box_xyxy[2] <= margin and right < width,
                bottom - box_xyxy[3] <= margin and bottom < height,
            ]
        )
        return bool(reached.any())


def make_tiles(width: int, height: int, side: int, overlap: float) -> list[Tile]:
    """Return tiles that cover an image, row by row, spaced as evenly as can be.

    Args:
        side: of a tile, pixels; a tile ends where the image does.
        overlap: least share of its side that a tile has in common with the next, 0 to below 1.
    """
    across, down = (_starts(length, side, overlap) for length in (width, height))
    return [
        Tile(left, top, min(side, width), min(side, height)) for top, left in product(down, across)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    step = max(1, math.floor(side * (1 - overlap)))
    count = math.ceil((length - side) / step) + 1
    return [int(start) for start in np.linspace(0, length - side, count).round()]
