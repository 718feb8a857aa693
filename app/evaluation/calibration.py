"""Calibrate the threshold of scores: the one that maximizes F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.evaluation.matching import CROWD, Overlaps


@dataclass(frozen=True)
class Calibration:
    """Hold micro F1 at IoU 0.5 over all images and classes, at its best threshold; each 0..1.

    Detections that score above the threshold count, as in `infer.sh`.
    """

    threshold: float
    f1: float
    precision: float
    recall: float


def calibrate(images: Sequence[Overlaps]) -> Calibration | None:
    """Return the threshold of the highest F1, halfway between the last score above it and the next.

    Of equal F1, the higher threshold is taken. None where no detection finds an object.
    """
    scores, hits = outcomes(images)
    objects = sum(int((~image.crowds).sum()) for image in images)
    if not hits.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, true_positives = scores[order], np.cumsum(hits[order])
    count = np.arange(1, len(scores) + 1)
    f1 = 2 * true_positives / (count + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # no threshold separates equal scores
    best = int(f1.argmax())
    after = float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    return Calibration(
        threshold=(float(scores[best]) + after) / 2,
        f1=float(f1[best]),
        precision=float(true_positives[best] / count[best]),
        recall=float(true_positives[best] / objects),
    )


def outcomes(images: Sequence[Overlaps]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (N,) of all detections not on crowds, and whether each finds an object."""
    chosen = [image.outcomes() for image in images]
    scores = [image.scores[c != CROWD] for image, c in zip(images, chosen, strict=True)]
    hits = [c[c != CROWD] >= 0 for c in chosen]
    return np.concatenate([*scores, np.zeros(0)]), np.concatenate([*hits, np.zeros(0, dtype=bool)])
