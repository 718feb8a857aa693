"""What went wrong, named: an example of each, and the table of confusions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from app.datasets.coco import Category, Dataset, Image
from app.evaluation.diagnosis import confusion, diagnose, extremes
from app.evaluation.matching import overlaps
from tests.evaluation.examples import BOX, found, truth

BESIDE = (80, 60, 20, 20)
HALF_OFF = (20, 10, 20, 20)  # IoU 1/3 with BOX


@pytest.mark.parametrize(
    ("results", "mistakes"),
    [
        ([], {"missed": 1}),
        ([found(1, 1, BOX, 0.9)], {}),
        ([found(1, 1, BOX, 0.9), found(1, 1, BOX, 0.8)], {"doubled": 1}),
        ([found(1, 2, BOX, 0.9)], {"wrong class": 1}),
        ([found(1, 1, HALF_OFF, 0.9)], {"poor mask": 1}),
        ([found(1, 1, BOX, 0.9), found(1, 2, BESIDE, 0.8)], {"off-prompt": 1}),
        ([found(1, 1, BOX, 0.9), found(1, 1, BESIDE, 0.8)], {"nothing there": 1}),
        ([found(1, 1, BOX, 0.9), found(1, 1, BESIDE, 0.5)], {}),  # not above the threshold
        ([found(1, 1, BESIDE, 0.9)], {"missed": 1, "nothing there": 1}),
    ],
)
def test_each_mistake(results, mistakes) -> None:
    image = overlaps(truth((1, 1, BOX)), results, "segm")[0]
    diagnosis = diagnose(image, 0.5)
    assert dict(+diagnosis.mistakes) == mistakes
    assert (diagnosis.quality == 1.0) is not bool(mistakes)


def test_quality_is_panoptic_quality() -> None:
    """IoU 0.5 with one of two objects, and one detection of nothing: 0.5 / (1 + (1 + 1) / 2)."""
    dataset = truth((1, 1, BOX), (1, 2, BESIDE))
    results = [found(1, 1, (10, 10, 20, 10), 0.9), found(1, 1, (50, 0, 9, 9), 0.9)]
    assert diagnose(overlaps(dataset, results, "segm")[0], 0.5).quality == pytest.approx(0.25)


def test_a_crowd_is_neither_missed_nor_wrong() -> None:
    image = overlaps(truth((1, 1, BOX, True)), [found(1, 1, BOX, 0.9)], "segm")[0]
    assert str(diagnose(image, 0.5)) == "all right"
    assert not confusion([image], [1, 2], 0.5).any()


def test_the_worst_and_the_best() -> None:
    """Image 1 right, image 2 missed, image 3 with nothing in it: neither."""
    images = overlaps(truth((1, 1, BOX), (2, 1, BOX)), [found(1, 1, BOX, 0.9)], "segm")
    worst, best = extremes(images, 0.5, 12)
    assert [d.image_id for d in worst] == [2]
    assert [d.image_id for d in best] == [1]


@pytest.mark.parametrize(
    ("images", "each"), [(1, (1, 0)), (3, (2, 1)), (10, (5, 5)), (30, (12, 12))]
)
def test_few_images_are_shared(images: int, each: tuple[int, int]) -> None:
    """All wrong, some worse: the second image has one object that is missed, the third two."""
    pictures = tuple(Image(i, Path(f"/{i}.png"), 120, 100) for i in range(images))
    plain = truth((0, 1, BOX)).annotations[0]
    objects = [replace(plain, image_id=i) for i in range(images) for _ in range(i + 2)]
    dataset = Dataset(pictures, tuple(objects), (Category(1, "a"),))
    results = [found(i, 1, BOX, 0.9) for i in range(images)]
    worst, best = extremes(overlaps(dataset, results, "segm"), 0.5, 12)
    assert (len(worst), len(best)) == each
    ids = list(range(images))
    assert [d.image_id for d in worst] == ids[::-1][: each[0]]
    assert [d.image_id for d in best] == ids[: each[1]]


def test_what_is_right_is_never_the_worst() -> None:
    labels = [(i, 1, BOX) for i in (1, 2, 3)]
    right = [found(i, 1, BOX, 0.9) for i in (1, 2, 3)]
    worst, best = extremes(overlaps(truth(*labels), right, "segm"), 0.5, 12)
    assert (worst, len(best)) == ([], 3)


def test_confusions() -> None:
    dataset = truth((1, 1, BOX), (1, 2, BESIDE), (2, 1, BOX))
    results = [found(1, 1, BOX, 0.9), found(1, 1, BESIDE, 0.8), found(3, 2, BOX, 0.7)]
    counts = confusion(overlaps(dataset, results, "segm"), [1, 2], 0.5)
    # rows: objects of a, of b, of nothing; columns: found as a, as b, not found
    assert np.array_equal(counts, [[1, 0, 1], [1, 0, 0], [0, 1, 0]])
