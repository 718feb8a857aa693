"""Polygons filled again are the mask, and are what RFC 7946 calls valid."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from app.inference.masks import place
from app.inference.polygons import Polygon, polygons


def fill(found: list[Polygon], height: int, width: int) -> np.ndarray:
    """Pixels whose centre a polygon covers, even-odd, by crossings counted to their left."""
    covered = np.zeros((height, width), dtype=bool)
    for ring in (ring for polygon in found for ring in polygon):
        for (x1, y1), (x2, y2) in itertools.pairwise(ring):
            assert x1 == x2 or y1 == y2  # along pixel edges
            covered[min(y1, y2) : max(y1, y2), x1:] ^= True
    return covered


def _area(ring: list[list[int]]) -> float:
    x, y = np.array(ring).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def _masks() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    ring = np.zeros((40, 50), dtype=np.uint8)
    cv2.circle(ring, (25, 20), 15, 1, 5)
    cv2.circle(ring, (25, 20), 3, 1, -1)  # an island in the hole
    diagonal = np.eye(6, dtype=bool)
    closed = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=bool)  # a hole closed by a corner
    names = {"ring": ring.astype(bool), "diagonal": diagonal, "closed by a corner": closed}
    noise = {f"noise {share}": random.random((30, 23)) < share for share in (0.1, 0.5, 0.9)}
    return {**names, **noise, "full": np.ones((5, 7), bool), "one pixel": np.ones((1, 1), bool)}


MASKS = _masks()


@pytest.mark.parametrize("name", MASKS)
def test_polygons_filled_again_are_the_mask(name: str) -> None:
    crop = MASKS[name]
    height, width = crop.shape[0] + 9, crop.shape[1] + 4
    found = polygons(place(crop, 3, 7, height, width))
    whole = np.zeros((height, width), bool)
    whole[7 : 7 + crop.shape[0], 3 : 3 + crop.shape[1]] = crop
    assert np.array_equal(fill(found, height, width), whole)


@pytest.mark.parametrize("name", MASKS)
def test_rings_are_simple_closed_and_turn_the_right_way(name: str) -> None:
    crop = MASKS[name]
    found = polygons(place(crop, 0, 0, *crop.shape))
    assert len(found) == cv2.connectedComponents(crop.astype(np.uint8), connectivity=4)[0] - 1
    for polygon in found:
        for ring in polygon:
            assert ring[0] == ring[-1]
            assert len({tuple(point) for point in ring}) == len(ring) - 1 >= 4
        outer, *holes = map(_area, polygon)
        assert outer > 0
        assert all(hole < 0 for hole in holes)


def test_an_empty_mask_has_none() -> None:
    assert polygons(place(np.zeros((3, 3), bool), 0, 0, 9, 9)) == []
