"""A run's gain in words: what was found before training and now, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hotcoco

from app.datasets.coco import Dataset
from app.evaluation.metrics import accumulate

FEW = 30  # images, below which a figure is rough
RESAMPLINGS = 200
Figures = Mapping[str, float]


def gain_in_words(
    before: Figures, now: Figures, dataset: Dataset, results: Sequence[dict[str, Any]]
) -> list[str]:
    """Return the lines that tell what training has brought.

    Args:
        before, now: figures of the validation before training, and of the best weights.
        results: COCO results of the best weights on `dataset`, for the interval.
    """
    objects = sum(not annotation.iscrowd for annotation in dataset.annotations)
    images = len(dataset.images)
    lines = [
        f"of {_count(objects, 'object')} in {_count(images, 'validation image')}: "
        f"{_found(before, objects)} before training, {_found(now, objects)} now"
    ]
    names = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
    gains = [
        f"{name} {before[key]:.2f} before, {now[key]:.2f} now"
        for key, name in names.items()
        if key in before and key in now
    ]
    low, high = interval(dataset, results)
    rough = f"; more images than {images} would narrow that" if images < FEW else ""
    lines.append(
        f"{'; '.join(gains)}. Box AP of other such images: {low:.2f} to {high:.2f} "
        f"(95 %, by bootstrap{rough})"
    )
    return lines


def interval(dataset: Dataset, results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the 95 % interval of box AP, by a bootstrap over images."""
    nothing, ours = (accumulate(dataset, each, "bbox") for each in ([], results))
    compared = hotcoco.compare(nothing, ours, n_bootstrap=RESAMPLINGS)  # nothing has an AP of 0
    bounds = (compared["ci"] or {}).get("AP") or {"lower": 0.0, "upper": 0.0}
    return bounds["lower"], bounds["upper"]


def _found(figures: Figures, objects: int) -> str:
    """Return how many were found at the threshold that suits the weights best, and false alarms."""
    hits = round(figures.get("calibration/recall", 0.0) * objects)
    if not hits:
        return "none was found"
    wrong = round(hits / figures["calibration/precision"]) - hits
    return f"{hits} found and {_count(wrong, 'false alarm')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
