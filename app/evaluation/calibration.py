"""The score from which a detection is worth saying: the threshold that maximises F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.evaluation.matching import CROWD, Overlaps


@dataclass(frozen=True)
class Calibration:
    """Micro F1 at IoU 0.5 over all images and classes, at its best threshold; each 0..1.

    What scores above the threshold counts, as in `infer.sh`.
    """

    threshold: float
    f1: float
    precision: float
    recall: float


def calibrate(images: Sequence[Overlaps]) -> Calibration | None:
    """The threshold that maximises F1, halfway between the last score that counts and the next.

    None where nothing is found at any threshold. Of equal F1, the higher threshold.
    """
    scores, hits = outcomes(images)
    objects = sum(int((~image.crowds).sum()) for image in images)
    if not hits.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(hits[order])
    count = np.arange(1, len(scores) + 1)
    f1 = 2 * found / (count + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # no threshold parts equal scores
    best = int(f1.argmax())
    after = float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    return Calibration(
        threshold=(float(scores[best]) + after) / 2,
        f1=float(f1[best]),
        precision=float(found[best] / count[best]),
        recall=float(found[best] / objects),
    )


def outcomes(images: Sequence[Overlaps]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) scores of all detections, and whether each finds an object; those of crowds left out."""
    chosen = [image.outcomes() for image in images]
    scores = [image.scores[c != CROWD] for image, c in zip(images, chosen, strict=True)]
    hits = [c[c != CROWD] >= 0 for c in chosen]
    return np.concatenate([*scores, np.zeros(0)]), np.concatenate([*hits, np.zeros(0, dtype=bool)])
