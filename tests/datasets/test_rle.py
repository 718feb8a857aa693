"""Run-length encoding in numpy beside pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from app.datasets import rle

SIDES = st.integers(1, 40)


def _coco(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


@st.composite
def _masks(draw: st.DrawFn, count: int) -> list[np.ndarray]:
    """Masks of one size; long runs as often as single pixels."""
    height, width = draw(SIDES), draw(SIDES)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    fields = random.random((count, height * width)).cumsum(axis=1)
    scale = draw(st.sampled_from([0.3, 1, 9, 100]))
    share = draw(st.sampled_from([0, 1, 2, 3, 4]))
    masks = (fields / scale).astype(int) % 4 < share
    return [mask.reshape(width, height).T for mask in masks]


@settings(deadline=None)
@given(_masks(count=1))
def test_masks_there_and_back(masks) -> None:
    coco = _coco(masks[0])
    np.testing.assert_array_equal(rle.decode(coco), masks[0])
    assert rle.from_bounds(rle.to_bounds(coco), *coco["size"]) == coco
    assert rle.area(coco) == coco_mask.area(coco)
    crop, left, top = rle.decode_crop(coco)
    assert [left, top, *reversed(crop.shape)] == coco_mask.toBbox(coco).tolist()
    np.testing.assert_array_equal(
        crop, masks[0][top : top + crop.shape[0], left : left + crop.shape[1]]
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**23), min_size=1, max_size=30))
def test_runs_of_any_length(counts) -> None:
    """Beside pycocotools, which gives each 6 bytes, and has none left to end a text of such."""
    coco = coco_mask.frPyObjects({"size": [1, 1], "counts": counts}, 1, 1)["counts"].decode()
    assert rle.compress(np.array(counts)) == coco
    assert rle.decompress(coco).tolist() == counts


def test_runs_longer_than_pycocotools_takes() -> None:
    counts = [0, 2**31 - 1, 5, 2**27]
    assert rle.decompress(rle.compress(np.array(counts))).tolist() == counts


@settings(deadline=None)
@given(_masks(count=4))
def test_what_masks_cover(masks) -> None:
    coco = [_coco(mask) for mask in masks]
    bounds = [rle.to_bounds(mask) for mask in coco]
    for intersect in (False, True):
        merged = rle.from_bounds(rle.merge(bounds, intersect=intersect), *coco[0]["size"])
        theirs = coco_mask.merge(coco, intersect=intersect)["counts"].decode()
        assert merged["counts"] == theirs
    ious = coco_mask.iou(coco[:1], coco, [0] * len(coco))[0]
    np.testing.assert_array_equal(rle.iou(bounds[0], bounds), np.nan_to_num(ious))  # NaN: empty


@pytest.mark.parametrize("text", ["", "o", "ooooooooo0", "\n", "~", "1é", "11o"])
def test_what_is_no_string_of_coco_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have 'counts'"):
        rle.decompress(text)


@pytest.mark.parametrize("counts", [[3], [5], [1, -1, 4]])
def test_runs_of_another_size_are_refused(counts: list[int]) -> None:
    mask = {"size": [2, 2], "counts": rle.compress(np.array(counts, dtype=np.int64))}
    with pytest.raises(ValueError, match="no RLE of 2 x 2 pixels"):
        rle.decode(mask)
