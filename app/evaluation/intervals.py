"""How far AP would move on other such images: intervals over the images that were scored.

They are BCa's (Efron, "Better bootstrap confidence intervals", 1987), which corrects percentiles
for the bias and the skew that an AP of few images has. Of many, both are the same.

A bootstrap of few images is too sure, because it draws from what little was seen: from five images,
BCa's 95 % held the AP of all in 61 %. So intervals are at least as wide as Student's by the
jackknife (Tukey, "Bias and confidence in not quite large samples", 1958), which serves alone where
images are many. hotcoco's own intervals are not used: it counts an image that is drawn twice once,
and so finds six tenths of the spread of 300 images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from app.datasets.coco import Dataset
from app.evaluation.metrics import accumulate, iou_types

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # of weights of I images, (R, I), one figure a row; nan: none
RESAMPLINGS = 1000
MANY = 100  # images, above which the jackknife serves alone
GROUPS = 50  # of images, at most, that the jackknife leaves out in turn
LEVEL = 0.95  # of such samples of images, which an interval covers
CHUNK = 50  # resamplings that are computed at once
ROWS = 5  # likewise where images may be many


@dataclass(frozen=True)
class Interval:
    """Hold the bounds that most of such samples of images would give."""

    low: float
    high: float

    def joined(self, other: Interval) -> Interval:
        """Return the interval from the lower of both bounds to the higher."""
        return Interval(min(self.low, other.low), max(self.high, other.high))

    def within(self, low: float, high: float) -> Interval:
        """Return the interval without what lies beyond the bounds."""
        return Interval(max(self.low, low), min(self.high, high))


EVERYTHING = Interval(-np.inf, np.inf)


def with_intervals(
    figures: Mapping[str, Any],
    truth: Dataset,
    results: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return figures with "bbox/AP_low" and "bbox/AP_high", likewise of masks.

    Args:
        before: results before training, boxes alone; with them "gain/bbox/AP" and its bounds.
    """
    found = dict(figures)
    for kind in iou_types(truth, results):
        bounds = ap_interval(truth, results, kind)
        found |= {f"{kind}/AP_low": bounds.low, f"{kind}/AP_high": bounds.high}
    if before is not None:
        gain, bounds = gain_interval(truth, before, results)
        found |= {"gain/bbox/AP": gain}
        found |= {"gain/bbox/AP_low": bounds.low, "gain/bbox/AP_high": bounds.high}
    return found


def ap_interval(
    truth: Dataset, results: Sequence[dict[str, Any]], kind: str, level: float = LEVEL
) -> Interval:
    """Return the interval of AP of boxes ("bbox") or masks ("segm").

    Args:
        level: 0..1, share of samples that it is to cover.
    """
    return interval(ByWeights(truth, results, kind), len(truth.images), level).within(0.0, 1.0)


def gain_interval(
    truth: Dataset,
    before: Sequence[dict[str, Any]],
    now: Sequence[dict[str, Any]],
    kind: str = "bbox",
) -> tuple[float, Interval]:
    """Return the difference of AP, and its interval; the same images are drawn for both."""
    first, second = (ByWeights(truth, results, kind) for results in (before, now))
    every = np.ones((1, len(truth.images)))
    gain = float((second(every) - first(every))[0])
    found = interval(lambda weights: second(weights) - first(weights), len(truth.images))
    return gain, found.within(-1.0, 1.0)


def interval(statistic: Statistic, images: int, level: float = LEVEL) -> Interval:
    """Return the bounds of a figure by bootstrap and jackknife, whichever are farther apart."""
    bounds = jackknife(statistic, images, level)
    return bounds if images > MANY else bounds.joined(bootstrap(statistic, images, level=level))


def jackknife(statistic: Statistic, images: int, level: float = LEVEL) -> Interval:
    """Return Student's interval of a figure, from its values without each group of images."""
    parts = groups(images)
    alone = np.array([np.isin(np.arange(images), part) for part in parts], dtype=float)
    chunks = np.array_split(alone, -(-len(parts) // ROWS))
    defining = sum(int((~np.isnan(statistic(chunk))).sum()) for chunk in chunks)
    if defining < 2:
        return EVERYTHING
    (observed,) = statistic(np.ones((1, images)))
    without_one = np.concatenate([statistic(1 - chunk) for chunk in chunks])
    return student(observed, without_one, defining, level)


def groups(images: int) -> list[NDArray[np.int_]]:
    """Return the places of images by the group that they are left out with: each alone, if few."""
    order = np.random.default_rng(0).permutation(images)
    return np.array_split(order, min(images, GROUPS))


def student(
    observed: float, without_one: Sequence[float] | Array, defining: int, level: float = LEVEL
) -> Interval:
    """Return Student's interval of a figure of N groups; infinite where one alone defines it.

    Args:
        without_one: (N,), the figure without each of them.
        defining: groups that have what it counts, one more than the degrees of freedom.
    """
    if defining < 2:
        return EVERYTHING
    deviation = np.std(without_one) * np.sqrt(len(without_one) - 1)
    half = float(stdtrit(defining - 1, (1 + level) / 2) * deviation)
    return Interval(float(observed - half), float(observed + half))


def bootstrap(
    statistic: Statistic, images: int, resamplings: int = RESAMPLINGS, level: float = LEVEL
) -> Interval:
    """Return the BCa interval of a figure; percentiles where BCa is not defined.

    Draws in which nothing defines the figure are left out. An interval of none is all of 0..1.
    """
    random = np.random.default_rng(0)
    draws = random.multinomial(images, np.full(images, 1 / images), resamplings)
    chunks = np.array_split(draws.astype(np.float64), max(1, resamplings // CHUNK))
    values = np.concatenate([statistic(chunk) for chunk in chunks])
    values = values[~np.isnan(values)]
    if not values.size:
        return Interval(0.0, 1.0)
    levels = np.array([(1 - level) / 2, (1 + level) / 2])
    if np.ptp(values) and images > 1:
        levels = _bca_levels(values, statistic, images, levels)
    low, high = np.quantile(values, levels)
    return Interval(float(low), float(high))


def _bca_levels(values: Array, statistic: Statistic, images: int, levels: Array) -> Array:
    """Return which quantiles of the draws are the bounds, in place of `levels`."""
    (observed,) = statistic(np.ones((1, images)))
    without_one = statistic(1 - np.eye(images))
    away = np.nanmean(without_one) - without_one[~np.isnan(without_one)]
    spread = (away**2).sum() ** 1.5
    share = ((values < observed).mean() + (values <= observed).mean()) / 2
    if not spread or not 0 < share < 1:
        return levels
    bias, acceleration = ndtri(share), (away**3).sum() / (6 * spread)
    shifted = bias + ndtri(levels)
    found: Array = ndtr(bias + shifted / (1 - acceleration * shifted))
    return found


class ByWeights:
    """COCO's AP as a function of how often each image was drawn, in parity with pycocotools.

    Where detections have the very same score, copies of an image stand together.
    """

    def __init__(self, truth: Dataset, results: Sequence[dict[str, Any]], kind: str) -> None:
        evaluation = accumulate(truth, results, kind)
        places = {image.id: index for index, image in enumerate(truth.images)}
        everything = list(evaluation.params.area_rng[0])
        self.recalls = np.asarray(evaluation.params.rec_thrs)  # 101 of them
        self.thresholds = len(evaluation.params.iou_thrs)
        by_class: dict[int, list[dict[str, Any]]] = {}
        for entry in evaluation.eval_imgs:
            if entry is not None and list(entry["aRng"]) == everything:
                by_class.setdefault(entry["category_id"], []).append(entry)
        self.classes = [_Class(entries, places, self.thresholds) for entries in by_class.values()]

    def __call__(self, weights: Array) -> Array:
        """Return AP, 0..1, for each row of weights (R, I); nan where no object was drawn."""
        aps = np.array([each.ap(weights, self.recalls) for each in self.classes])  # (C, R)
        if not aps.size:
            return np.full(len(weights), np.nan)
        defined = ~np.isnan(aps)
        counts = defined.sum(axis=0)
        sums = np.where(defined, aps, 0.0).sum(axis=0)
        found: Array = np.where(counts, sums / np.maximum(counts, 1), np.nan)
        return found


class _Class:
    """Hold the D detections of a class, the highest score first, at T overlaps.

    Attributes:
        images: (D,) places of their images.
        matched, ignored: (T, D) bool.
        objects: (I,) number of its objects in each image.
    """

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], places: Mapping[int, int], overlaps: int
    ) -> None:
        entries = sorted(entries, key=lambda entry: places[entry["image_id"]])
        scores = np.concatenate([np.asarray(entry["dtScores"], dtype=float) for entry in entries])
        order = np.argsort(-scores, kind="mergesort")

        def joined(name: str) -> NDArray[np.bool_]:
            parts = [np.asarray(e[name], dtype=bool).reshape(overlaps, -1) for e in entries]
            return np.concatenate(parts, axis=1)[:, order]

        counts = [len(entry["dtScores"]) for entry in entries]
        where = [places[entry["image_id"]] for entry in entries]
        self.images = np.repeat(where, counts)[order]
        self.matched, self.ignored = joined("dtMatched"), joined("dtIgnore")
        self.objects = np.zeros(len(places))
        for place, entry in zip(where, entries, strict=True):
            self.objects[place] = np.sum(entry["gtInDenominator"])

    def ap(self, weights: Array, recalls: Array) -> Array:
        """Return AP (R,) by weights (R, I); nan where none of its objects was drawn."""
        objects = weights @ self.objects  # (R,)
        drawn = weights[:, self.images]  # (R, D)
        if not drawn.shape[1]:
            return np.where(objects > 0, 0.0, np.nan)
        true = (drawn[:, None] * (self.matched & ~self.ignored)).cumsum(axis=-1)  # (R, T, D)
        false = (drawn[:, None] * (~self.matched & ~self.ignored)).cumsum(axis=-1)
        recall = true / np.maximum(objects, 1)[:, None, None]
        precision = true / np.maximum(true + false, np.spacing(1))
        precision = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
        passed = np.searchsorted(recalls, recall, side="right")  # of the 101, by each detection
        new = np.diff(passed, axis=-1, prepend=0)
        aps: Array = (new * precision).sum(axis=-1).mean(axis=-1) / len(recalls)
        return np.where(objects > 0, aps, np.nan)
