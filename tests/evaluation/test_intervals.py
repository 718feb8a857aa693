"""Intervals of AP: the AP itself beside hotcoco's, BCa beside scipy's, and what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from app.datasets.coco import Dataset
from app.evaluation import intervals
from app.evaluation.intervals import (
    ByWeights,
    Interval,
    ap_interval,
    bootstrap,
    gain_interval,
    jackknife,
    with_intervals,
)
from app.evaluation.metrics import evaluate
from tests.evaluation.examples import BOX, found, truth


def _results(dataset: Dataset, error: float, seed: int = 0) -> list[dict[str, Any]]:
    """Two detections an object, displaced by some pixels, some of another class."""
    random = np.random.default_rng(seed)
    return [
        {
            "image_id": a.image_id,
            "category_id": a.category_id if random.random() < 0.8 else 1,
            "bbox": [side + random.normal() * error for side in a.bbox_xywh],
            "score": float(random.uniform(0.5, 1)),
        }
        for a in dataset.annotations
        for _ in range(2)
    ]


def _drawn(dataset: Dataset, results: Sequence[dict], draw: np.ndarray) -> float:
    """The AP of a set in which each image is as often as it was drawn, by hotcoco."""
    images, annotations, detections = [], [], []
    for index in np.repeat(np.arange(len(draw)), draw):
        image, number = dataset.images[index], len(images) + 1
        images.append(replace(image, id=number))
        for annotation in dataset.annotations_by_image[image.id]:
            new = {"image_id": number, "id": len(annotations) + 1}
            annotations.append(replace(annotation, **new))
        detections += [r | {"image_id": number} for r in results if r["image_id"] == image.id]
    sample = Dataset(tuple(images), tuple(annotations), dataset.categories)
    return evaluate(sample, detections)["bbox/AP"]


def test_ap_by_weights_is_that_of_the_images_drawn(dataset: Dataset) -> None:
    results = _results(dataset, 1.5)
    random, count = np.random.default_rng(2), len(dataset.images)
    draws = random.multinomial(count, np.full(count, 1 / count), 20)
    aps = ByWeights(dataset, results, "bbox")(draws.astype(float))
    expected = [_drawn(dataset, results, draw) for draw in draws]
    np.testing.assert_allclose(aps, expected, atol=1e-12)
    assert np.ptp(aps) > 0.1


def test_crowds_and_masks_count_as_in_coco() -> None:
    labels = truth((1, 1, BOX), (1, 1, (50, 50, 30, 30), True), (2, 2, BOX))
    results = [
        *(found(1, 1, BOX, 0.9), found(1, 1, (55, 55, 10, 10), 0.8), found(2, 2, BOX, 0.4)),
        *(found(2, 2, (60, 60, 9, 9), 0.6), found(3, 1, BOX, 0.95)),
    ]
    figures = evaluate(labels, results)
    for kind in ("bbox", "segm"):
        (ap,) = ByWeights(labels, results, kind)(np.ones((1, 3)))
        assert ap == pytest.approx(figures[f"{kind}/AP"], abs=1e-12)
        assert 0 < ap < 1
    nothing = ByWeights(labels, results, "bbox")(np.array([[0.0, 0, 3], [0, 0, 0]]))
    assert np.isnan(nothing).all()


@pytest.mark.parametrize("skewed", [False, True])
def test_bounds_are_scipys(skewed: bool) -> None:
    """Of a mean, and of a skewed statistic, where percentiles are elsewhere."""
    values = np.random.default_rng(1).exponential(size=15)

    def statistic(weights: np.ndarray) -> np.ndarray:
        means = weights @ values / weights.sum(axis=1)
        squares = weights @ values**2 / weights.sum(axis=1)
        return squares - means**2 if skewed else means

    def scipys(x: np.ndarray, axis: int) -> np.ndarray:
        return x.var(axis=axis) if skewed else x.mean(axis=axis)

    bounds = bootstrap(statistic, len(values), 9999)
    expected = {
        method: scipy.stats.bootstrap(
            (values,), scipys, n_resamples=9999, method=method, rng=np.random.default_rng(3)
        ).confidence_interval
        for method in ("BCa", "percentile")
    }
    spread = expected["BCa"].high - expected["BCa"].low
    assert bounds.low == pytest.approx(expected["BCa"].low, abs=0.03 * spread)
    assert bounds.high == pytest.approx(expected["BCa"].high, abs=0.06 * spread)
    assert abs(expected["percentile"].high - expected["BCa"].high) > 0.08 * spread


def test_the_jackknife_of_a_mean_is_students() -> None:
    values = np.random.default_rng(1).exponential(size=7)

    def mean(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return weights[:, :7] @ values / weights[:, :7].sum(axis=1)

    for level in (0.9, 0.95):
        found = jackknife(mean, 7, level)
        error = scipy.stats.sem(values)
        expected = scipy.stats.t.interval(level, 6, loc=values.mean(), scale=error)
        assert (found.low, found.high) == pytest.approx(expected)
    with_empty = jackknife(mean, 9)  # two more images, without objects: they tell nothing of it
    assert with_empty.low < found.low < found.high < with_empty.high
    assert with_empty.high - with_empty.low < 1.1 * (found.high - found.low)


def test_few_images_are_not_sure() -> None:
    """One says nothing; two that both gained a little are no gain, and alike is a point."""
    one = truth((1, 1, BOX))
    assert ap_interval(one, [found(1, 1, BOX, 0.9)], "bbox") == Interval(0, 1)
    assert gain_interval(one, [], [found(1, 1, BOX, 0.9)]) == (1, Interval(-1, 1))
    near = [BOX[0] + 2, *BOX[1:]]  # matched at some of the overlaps
    two = truth((1, 1, BOX), (2, 1, BOX))
    gain, bounds = gain_interval(two, [], [found(1, 1, BOX, 0.9), found(2, 1, near, 0.9)])
    assert 0.7 < gain < 1
    assert bounds.low < 0 < bounds.high


def test_what_has_no_spread_is_a_point(dataset: Dataset) -> None:
    exact = [
        {"image_id": a.image_id, "category_id": a.category_id, "bbox": a.bbox_xywh, "score": 0.9}
        for a in dataset.annotations
    ]
    assert ap_interval(dataset, exact, "bbox") == Interval(1, 1)
    assert ap_interval(dataset, [], "bbox") == Interval(0, 0)
    assert gain_interval(dataset, exact, exact) == (0, Interval(0, 0))


def test_a_gain_is_of_the_same_images(dataset: Dataset) -> None:
    """Its interval is narrower than those of both, and holds 0 where nothing was gained."""
    rough, fine = _results(dataset, 2.5), _results(dataset, 0.5)
    gain, bounds = gain_interval(dataset, rough, fine)
    aps = [evaluate(dataset, each)["bbox/AP"] for each in (rough, fine)]
    assert gain == pytest.approx(aps[1] - aps[0])
    assert 0 < bounds.low < gain < bounds.high
    one, other = _results(dataset, 1.5), _results(dataset, 1.5, seed=7)
    _, bounds = gain_interval(dataset, one, other)
    assert bounds.low <= 0 <= bounds.high


def test_of_many_images_the_jackknife_serves(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups it finds the spread that copies of the drawn images have, scored by hotcoco."""
    results, count = _results(dataset, 1.5), len(dataset.images)
    monkeypatch.setattr(intervals, "MANY", 5)
    monkeypatch.setattr(intervals, "GROUPS", 6)
    found = ap_interval(dataset, results, "bbox")
    random = np.random.default_rng(2)
    draws = [random.multinomial(count, np.full(count, 1 / count)) for _ in range(60)]
    spread = np.std([_drawn(dataset, results, draw) for draw in draws])
    half = scipy.stats.t.ppf(0.975, 5) * spread
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.4)
    assert sorted(np.concatenate(intervals.groups(count)).tolist()) == list(range(count))
    gain, _ = gain_interval(dataset, _results(dataset, 2.5), results)
    assert gain > 0


def test_figures_have_their_bounds() -> None:
    labels, results = truth((1, 1, BOX), (2, 2, BOX)), [found(1, 1, BOX, 0.9)]
    figures = with_intervals({"bbox/AP": 0.5, "x": 1}, labels, results, before=[])
    assert figures["x"] == 1
    assert {name for name in figures if name not in ("bbox/AP", "x")} == {
        *("bbox/AP_low", "bbox/AP_high", "segm/AP_low", "segm/AP_high"),
        *("gain/bbox/AP", "gain/bbox/AP_low", "gain/bbox/AP_high"),
    }
    assert figures["gain/bbox/AP"] == 0.5
