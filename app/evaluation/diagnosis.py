"""What went wrong in an image, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.evaluation.matching import MISSES, Overlaps

FINDS = 0.5  # IoU from which a detection finds an object
TOUCHES = 0.1  # IoU from which it means the object, badly
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
    """An image's quality, 0..1, and how often each of KINDS went wrong in it.

    Quality is panoptic quality (arXiv 1801.00868): the sum of the matched IoU, divided by
    TP + (FP + FN) / 2; 1 where nothing is there and nothing was found.
    """

    image_id: int
    quality: float
    mistakes: Counter[str]

    def __str__(self) -> str:
        listed = ", ".join(f"{self.mistakes[kind]} {kind}" for kind in KINDS if self.mistakes[kind])
        return listed or "all right"


def diagnose(image: Overlaps, threshold: float) -> Diagnosis:
    """What is wrong with the detections that score above the threshold."""
    image = above(image, threshold)
    chosen = image.outcomes(FINDS)
    wrong, hits = np.flatnonzero(chosen == MISSES), np.flatnonzero(chosen >= 0)
    mistakes = Counter(_mistake(image, index) for index in wrong)
    unfound = np.setdiff1d(np.flatnonzero(~image.crowds), chosen)
    meant = [_is_meant(image, wrong, index) for index in unfound]
    mistakes["missed"] = meant.count(False)
    total = len(hits) + (len(wrong) + len(unfound)) / 2
    quality = float(image.iou[hits, chosen[hits]].sum()) / total if total else 1.0
    return Diagnosis(image.image_id, quality, mistakes)


def above(image: Overlaps, threshold: float) -> Overlaps:
    """The image with the detections that score above the threshold alone."""
    kept = image.scores > threshold
    results = [result for result, keep in zip(image.results, kept, strict=True) if keep]
    return replace(
        image,
        results=results,
        scores=image.scores[kept],
        found=image.found[kept],
        iou=image.iou[kept],
    )


def extremes(
    images: Sequence[Overlaps], threshold: float, count: int
) -> tuple[list[Diagnosis], list[Diagnosis]]:
    """The worst and the best images, by quality; those without mistakes are never the worst.

    Images with neither objects nor detections are neither. Of fewer than twice `count`, the worst
    have the lower half, and one of an odd number.
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
    """(C + 1, C + 1) counts: row, the class of an object; column, what it was found as.

    The last row counts detections of nothing, the last column objects that were not found. Of any
    classes, the pair of the highest IoU is matched first, down to an IoU of 0.5.
    """
    order = {category: index for index, category in enumerate(categories)}
    counts = np.zeros((len(order) + 1, len(order) + 1), dtype=np.int64)
    for image in images:
        image = above(image, threshold)
        pairs = _match(image)
        crowded: NDArray[np.bool_] = np.any(image.iou[:, image.crowds] >= FINDS, axis=1)
        for detection, category in enumerate(image.found):
            if detection in pairs:
                counts[order[image.objects[pairs[detection]]], order[category]] += 1
            elif not crowded[detection]:
                counts[-1, order[category]] += 1
        for index in set(np.flatnonzero(~image.crowds).tolist()) - set(pairs.values()):
            counts[order[image.objects[index]], -1] += 1
    return counts


def _match(image: Overlaps) -> dict[int, int]:
    """Object by detection, of any classes."""
    iou = np.where(image.crowds, 0.0, image.iou)
    pairs: dict[int, int] = {}
    while iou.size and iou.max() >= FINDS:
        detection, index = divmod(int(iou.argmax()), iou.shape[1])
        pairs[detection] = index
        iou[detection], iou[:, index] = 0.0, 0.0
    return pairs


def _mistake(image: Overlaps, index: int) -> str:
    own: NDArray[np.bool_] = image.objects == image.found[index]
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
    """Whether a wrong detection stands for this object: named once, by what is wrong with it."""
    own = image.found[wrong] == image.objects[index]
    return bool((image.iou[wrong, index] >= np.where(own, TOUCHES, FINDS)).any())
