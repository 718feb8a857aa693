"""How unsure weights are of an image, from what they find in it."""

from __future__ import annotations

import numpy as np

from app.inference.detections import Detections
from app.inference.finder import Finder
from app.model.score_counts import BINS, bins_of


def doubt_of(finder: Finder, found: Detections) -> float:
    """Return how unsure an answer is, 0..1: by its score that is nearest to the weights' threshold.

    That is of a detection, or of what was nearly one. Where the weights tell the scores of the
    validation images, half of the doubt is how seldom a detection scored so there.
    """
    threshold = finder.threshold
    scores = found.scores if len(found) else np.array([found.best_score or 0.0])
    nearness = 1 - np.abs(scores - threshold) / max(threshold, 1 - threshold)
    if finder.scores is None:
        return float(nearness.max())
    counts = np.sum([[0] * BINS, *finder.scores.counts.values()], axis=0)
    share = counts[bins_of(scores)] / max(1, counts.sum())
    rareness = 1 - np.minimum(1, share * BINS)  # 0: as often as the scores of a mean bin
    return float(((nearness + rareness) / 2).max())
