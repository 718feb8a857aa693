"""Objects are drawn over tiles; what a perfect model would find in each tile is made by hand."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from app.inference.detections import Detections
from app.inference.masks import place
from app.inference.merging import merge_tiles, suppress
from app.inference.tiles import Tile, make_tiles

WIDTH, HEIGHT = 200, 120
TILES = make_tiles(WIDTH, HEIGHT, 80, 0.25)


def _draw(shape: Callable[[np.ndarray], object]) -> np.ndarray:
    canvas = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    shape(canvas)
    return canvas.astype(bool)


def _detections(masks, scores=None, prompt_ids=None, with_masks=True) -> Detections:
    """Args: masks: (H, W) bool each, of an image or tile of any size."""
    height, width = masks[0].shape if len(masks) else (HEIGHT, WIDTH)
    rles = [place(mask, 0, 0, height, width) for mask in masks]
    boxes = [coco_mask.toBbox(rle) for rle in rles]
    return Detections(
        boxes_xyxy=np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], "f4").reshape(-1, 4),
        scores=np.array(scores if scores is not None else [0.9] * len(masks), dtype=np.float32),
        prompt_ids=np.array(prompt_ids or [0] * len(masks), dtype=np.int64),
        prompts=("cell", "tree"),
        masks=rles if with_masks else None,
        width=width,
        height=height,
    )


def _see(tile: Tile, objects: list[np.ndarray], prompt_ids=None, **options) -> Detections:
    """What a perfect model finds in a tile; the score is the share of the object in it."""
    left, top, right, bottom = tile.box_xyxy
    crops = [(mask[top:bottom, left:right], mask.sum()) for mask in objects]
    visible = [index for index, (crop, _) in enumerate(crops) if crop.any()]
    found = _detections(
        [crops[index][0] for index in visible],
        [crops[index][0].sum() / crops[index][1] for index in visible],
        [prompt_ids[index] if prompt_ids else 0 for index in visible],
        **options,
    )
    if visible:
        return found
    return _detections([np.zeros((tile.height, tile.width), bool)], **options).select([])


def _find(objects: list[np.ndarray], prompt_ids=None, **options) -> Detections:
    found = [_see(tile, objects, prompt_ids, **options) for tile in TILES]
    return merge_tiles(TILES, found, WIDTH, HEIGHT)


OBJECTS = {
    "within one tile": _draw(lambda c: cv2.circle(c, (25, 25), 10, 1, -1)),
    "on a seam": _draw(lambda c: cv2.circle(c, (70, 25), 18, 1, -1)),
    "on a corner of four": _draw(lambda c: cv2.circle(c, (70, 60), 30, 1, -1)),
    "across all": _draw(lambda c: cv2.line(c, (2, 4), (197, 110), 1, 5)),
    "with a hole": _draw(lambda c: cv2.circle(c, (100, 60), 45, 1, 6)),
    "two arms, joined in the next tile": _draw(
        lambda c: cv2.polylines(c, [np.array([[10, 10], [110, 10], [110, 40], [10, 40]])], False, 1)
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_found_once_and_whole(name: str) -> None:
    merged = _find([OBJECTS[name]])
    assert len(merged) == 1
    assert np.array_equal(merged.bool_masks()[0], OBJECTS[name])
    x, y, w, h = coco_mask.toBbox(merged.masks[0])
    assert merged.boxes_xyxy[0].tolist() == [x, y, x + w, y + h]


def test_neighbours_on_a_seam_stay_apart() -> None:
    one = _draw(lambda c: cv2.rectangle(c, (50, 20), (90, 40), 1, -1))
    two = _draw(lambda c: cv2.rectangle(c, (50, 41), (90, 60), 1, -1))
    merged = _find([one, two])
    assert len(merged) == 2
    assert {mask.tobytes() for mask in merged.bool_masks()} == {one.tobytes(), two.tobytes()}


def test_prompts_are_not_joined() -> None:
    merged = _find([OBJECTS["on a seam"], OBJECTS["on a seam"]], prompt_ids=[0, 1])
    assert sorted(merged.prompt_ids) == [0, 1]


def test_a_sliver_that_a_tile_cut_off_joins_the_whole() -> None:
    """Seen by 5 columns alone, the object's part is drawn badly: half of it, and some beside it."""
    tiles = [Tile(0, 0, 80, 120), Tile(60, 0, 80, 120)]
    whole = _draw(lambda c: cv2.rectangle(c, (20, 30), (64, 69), 1, -1))
    sliver = np.zeros((120, 80), bool)
    sliver[45:62, 0:8] = True  # 5 of its 8 columns are the object's: IoU 0.41, 0.63 of it inside
    merged = merge_tiles(tiles, [_see(tiles[0], [whole]), _detections([sliver])], WIDTH, HEIGHT)
    assert len(merged) == 1
    moved = np.roll(sliver, 0)
    assert merged.bool_masks()[0].sum() == (whole.sum() + moved.sum() - 5 * 17)


def test_a_small_object_inside_a_large_one_stays() -> None:
    large = _draw(lambda c: cv2.rectangle(c, (10, 5), (150, 100), 1, -1))
    small = _draw(lambda c: cv2.circle(c, (70, 50), 5, 1, -1))  # in two tiles, cut by neither
    assert len(_find([large, small])) == 2


def test_boxes_alone_are_merged_as_well() -> None:
    merged = _find([OBJECTS["on a seam"], OBJECTS["within one tile"]], with_masks=False)
    assert merged.masks is None
    assert sorted(merged.boxes_xyxy.tolist()) == [[15, 15, 36, 36], [52, 7, 89, 44]]


def test_the_highest_score_is_kept_and_comes_first() -> None:
    on_seam = OBJECTS["on a seam"]
    merged = _find([on_seam, OBJECTS["within one tile"]])
    shares = [on_seam[t.top : t.top + t.height, t.left : t.left + t.width].sum() for t in TILES]
    assert merged.scores.tolist() == pytest.approx([1, max(shares) / on_seam.sum()])
    assert np.array_equal(merged.bool_masks()[1], on_seam)


def test_nothing_found() -> None:
    merged = _find([])
    assert (len(merged), merged.masks, merged.boxes_xyxy.shape) == (0, [], (0, 4))
    assert len(suppress(merged, 0.5)) == 0


def test_suppression_looks_at_masks_across_prompts() -> None:
    """A ring and the disc in its hole have the same box, nearly, and no pixel in common."""
    ring = _draw(lambda c: cv2.circle(c, (60, 60), 40, 1, 6))
    disc = _draw(lambda c: cv2.circle(c, (60, 60), 34, 1, -1)) & ~ring
    again = np.roll(ring, 1, axis=1)
    found = _detections([ring, disc, again], [0.9, 0.8, 0.7], [0, 0, 1])
    assert suppress(found, 0.5).scores.tolist() == pytest.approx([0.9, 0.8])
    assert len(suppress(found, 0.95)) == 3
    boxes_only = _detections([ring, disc, again], [0.9, 0.8, 0.7], [0, 0, 1], with_masks=False)
    assert suppress(boxes_only, 0.5).scores.tolist() == pytest.approx([0.9])
