from __future__ import annotations

import itertools

import numpy as np
import pytest

from app.inference.tiles import Tile, make_tiles


@pytest.mark.parametrize(
    ("width", "height", "side", "overlap"),
    [(3000, 2000, 1008, 0.2), (1009, 500, 1008, 0.2), (100, 70, 33, 0), (64, 64, 20, 0.9)],
)
def test_tiles_cover_the_image_and_overlap(width, height, side, overlap) -> None:
    tiles = make_tiles(width, height, side, overlap)
    seen = np.zeros((height, width), dtype=int)
    for tile in tiles:
        left, top, right, bottom = tile.box_xyxy
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (tile.width, tile.height) == (min(side, width), min(side, height))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    for values in ({t.left for t in tiles}, {t.top for t in tiles}):
        ordered = sorted(values)
        steps = [after - before for before, after in itertools.pairwise(ordered)]
        assert max(steps, default=0) <= side * (1 - overlap) + 1


def test_no_more_tiles_than_needed() -> None:
    assert make_tiles(800, 600, 1008, 0.2) == [Tile(0, 0, 800, 600)]
    assert len(make_tiles(3000, 2000, 1008, 0.2)) == 4 * 3


def test_what_two_tiles_share() -> None:
    one = Tile(0, 0, 100, 50)
    assert one.shared(Tile(80, 10, 100, 50)) == Tile(80, 10, 20, 40)
    assert one.shared(Tile(100, 0, 100, 50)) is None


def test_a_box_is_cut_by_its_tile_and_not_by_the_images_own_edge() -> None:
    tile = Tile(0, 100, 100, 100)
    assert not tile.cuts((0, 150, 40, 160), 300, 300, 2)  # the image's left edge
    assert not tile.cuts((10, 110, 90, 190), 300, 300, 2)
    assert tile.cuts((10, 110, 99, 190), 300, 300, 2)
    assert tile.cuts((10, 101, 50, 190), 300, 300, 2)
    assert not tile.cuts((10, 110, 99, 190), 100, 300, 2)
