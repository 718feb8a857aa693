"""Diagnose the mistakes in an image, each by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.evaluation.matching import MISSES, Overlaps

FINDS = 0.5  # IoU from which a detection finds an object
TOUCHES = 0.1  # IoU from which a detection means an object of its class, though badly
KINDS = {
    "missed": "objects that no detection means",
    "doubled": "more than one detection of one object",
    "wrong class": "an object of another class",
    "poor mask": f"IoU from {TOUCHES:g} to {FINDS:g} with an object of its class",
    "off-prompt": "a detection of a class that the image lacks",
    "nothing there": "a detection beside all objects, of a class that the image has",
}


@dataclass(frozen=True)
class Diagnosis:
    """Hold an image's quality, 0..1, and the number of mistakes of each of KINDS.

    Quality is panoptic quality (arXiv 1801.00868): the sum of the matched IoU, divided by
    TP + (FP + FN) / 2; 1 where there are neither objects nor detections.
    """

    image_id: int
    quality: float
    mistakes: Counter[str]

    def __str__(self) -> str:
        listed = ", ".join(f"{self.mistakes[kind]} {kind}" for kind in KINDS if self.mistakes[kind])
        return listed or "all right"


def diagnose(image: Overlaps, threshold: float) -> Diagnosis:
    """Diagnose the detections of an image that score above the threshold."""
    image = above(image, threshold)
    chosen = image.outcomes(FINDS)
    wrong, hits = np.flatnonzero(chosen == MISSES), np.flatnonzero(chosen >= 0)
    mistakes = Counter(_mistake(image, index) for index in wrong)
    missed = np.setdiff1d(np.flatnonzero(~image.crowds), chosen)
    meant = [_is_meant(image, wrong, index) for index in missed]
    mistakes["missed"] = meant.count(False)
    total = len(hits) + (len(wrong) + len(missed)) / 2
    quality = float(image.iou[hits, chosen[hits]].sum()) / total if total else 1.0
    return Diagnosis(image.image_id, quality, mistakes)


def above(image: Overlaps, threshold: float) -> Overlaps:
    """Return the image with only the detections that score above the threshold."""
    is_above = image.scores > threshold
    results = [result for result, keep in zip(image.results, is_above, strict=True) if keep]
    return replace(
        image,
        results=results,
        scores=image.scores[is_above],
        detected=image.detected[is_above],
        iou=image.iou[is_above],
    )


def extremes(
    images: Sequence[Overlaps], threshold: float, count: int
) -> tuple[list[Diagnosis], list[Diagnosis]]:
    """Return the worst and the best images by quality; an image without mistakes is never a worst.

    Images with neither objects nor detections are left out. Of fewer than 2 x `count` images, the
    lower half are the worst, with the middle one of an odd number.
    """
    shown = [i for i in images if i.objects.size or (i.scores > threshold).any()]
    ranked = sorted((diagnose(image, threshold) for image in shown), key=lambda d: d.quality)
    most = min(count, (len(ranked) + 1) // 2)
    worst = [diagnosis for diagnosis in ranked if diagnosis.mistakes.total()][:most]
    chosen = {diagnosis.image_id for diagnosis in worst}
    best = [diagnosis for diagnosis in reversed(ranked) if diagnosis.image_id not in chosen]
    return worst, best[:count]


def confusion(
    images: Sequence[Overlaps], categories: Sequence[int], threshold: float
) -> NDArray[np.int64]:
    """Return counts (C + 1, C + 1): rows are classes of objects, columns of their detections.

    The last row counts detections of no object, the last column objects without a detection. The
    pair of the highest IoU is matched first, whatever its classes, down to an IoU of 0.5.
    """
    order = {category: index for index, category in enumerate(categories)}
    counts = np.zeros((len(order) + 1, len(order) + 1), dtype=np.int64)
    for image in images:
        image = above(image, threshold)
        pairs = _match(image)
        crowded: NDArray[np.bool_] = np.any(image.iou[:, image.crowds] >= FINDS, axis=1)
        for detection, category in enumerate(image.detected):
            if detection in pairs:
                counts[order[image.objects[pairs[detection]]], order[category]] += 1
            elif not crowded[detection]:
                counts[-1, order[category]] += 1
        for index in set(np.flatnonzero(~image.crowds).tolist()) - set(pairs.values()):
            counts[order[image.objects[index]], -1] += 1
    return counts


def _match(image: Overlaps) -> dict[int, int]:
    """Return the object of each matched detection, whatever their classes."""
    iou = np.where(image.crowds, 0.0, image.iou)
    pairs: dict[int, int] = {}
    while iou.size and iou.max() >= FINDS:
        detection, index = divmod(int(iou.argmax()), iou.shape[1])
        pairs[detection] = index
        iou[detection], iou[:, index] = 0.0, 0.0
    return pairs


def _mistake(image: Overlaps, index: int) -> str:
    """Return the kind of mistake of a detection that finds no object."""
    own: NDArray[np.bool_] = image.objects == image.detected[index]
    iou = np.where(image.crowds, 0.0, image.iou[index])
    with_own, with_others = iou[own].max(initial=0.0), iou[~own].max(initial=0.0)
    if with_own >= FINDS:
        return "doubled"
    if with_others >= FINDS:
        return "wrong class"
    if with_own >= TOUCHES:
        return "poor mask"
    return "nothing there" if own.any() else "off-prompt"


def _is_meant(image: Overlaps, wrong: NDArray[np.int64], index: int) -> bool:
    """Return whether a wrong detection means this object, whose mistake is then counted there."""
    own = image.detected[wrong] == image.objects[index]
    return bool((image.iou[wrong, index] >= np.where(own, TOUCHES, FINDS)).any())
