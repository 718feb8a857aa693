"""Score prompted segmentation as SAM 3's paper does: pmF1, IL_MCC, cgF1."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from app.evaluation.matching import Overlaps

SCORE = 0.5  # the paper's threshold of detections
IOUS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class Presence:
    """Count (image, prompt) pairs by whether the thing is there and whether anything was found."""

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    true_negatives: int = 0

    def __add__(self, other: Presence) -> Presence:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Presence(*(one + another for one, another in pairs))

    def mcc(self) -> float | None:
        """Return Matthews correlation, -1..1; None where all pairs, or none, have the thing."""
        tp, fp, fn, tn = vars(self).values()
        if not (tp + fn) or not (tn + fp):
            return None
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def concept_figures(
    images: Sequence[Overlaps], categories: Collection[int], others: Presence | None = None
) -> dict[str, float]:
    """Return "pmF1", "IL_MCC", "IL_F1" and "cgF1" of SAM 3's paper (arXiv 2511.16719).

    A pair is an image and a prompt. Detections that score 0.5 or more are matched with the objects
    of the pair one to one, at the highest sum of IoU.

    - **pmF1**, positive micro F1: 2 TP / (2 TP + FP + FN), counted over all pairs whose thing is
      there, for each IoU threshold 0.50, 0.55, … 0.95; their mean.
    - **IL_MCC**, image-level Matthews correlation: how well "anything found" tells whether the
      thing is there, over all pairs: (TP TN - FP FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)). IL_F1 is
      the F1 of the same counts.
    - **cgF1**, classification-gated F1 = pmF1 x IL_MCC. The paper prints it times 100.

    Upstream's sam3/eval/cgf1_eval.py adds 1e-4 to denominators, and scores what is not defined 0;
    here the figure is left out. Crowds are no objects, as there.

    Args:
        images: masks' or boxes' overlaps.
        categories: ids that every image was asked for.
        others: pairs of further prompts, for things in no image, that the images do not tell of.
    """
    counts = sum((concept_counts(image, categories) for image in images), np.zeros(16))
    return figures_of(counts, others or Presence())


def concept_counts(image: Overlaps, categories: Collection[int]) -> NDArray[np.float64]:
    """Return the counts (16,) of an image that the figures are functions of; they can be summed.

    Of the pairs: those of `Presence`; of what is there: detections, objects, and hits at each of
    the ten IoU thresholds.
    """
    counts, is_object = image.scores >= SCORE, ~image.crowds  # (D,), (G,)
    present = set(image.objects[is_object].tolist())
    answered = set(image.detected[counts].tolist())
    hits, detections, objects = np.zeros(10), 0, 0
    for category in present:
        rows = counts & (image.detected == category)
        columns = is_object & (image.objects == category)
        hits += _hits(image.iou[np.ix_(rows, columns)])
        detections += int(rows.sum())
        objects += int(columns.sum())
    presence = _presence(set(categories), present, answered)
    return np.array([*vars(presence).values(), detections, objects, *hits])


def figures_of(counts: NDArray[np.float64], others: Presence) -> dict[str, float]:
    """Return the figures of `concept_figures` from summed counts and further pairs."""
    presence = Presence(*counts[:4].tolist()) + others
    detections, objects, hits = counts[4], counts[5], counts[6:]
    figures: dict[str, float] = {}
    if objects:  # F1 = 2 TP / (detections + objects)
        figures["pmF1"] = float(np.mean(2 * hits / (detections + objects)))
    if (mcc := presence.mcc()) is not None:
        tp, fp, fn, _ = vars(presence).values()
        figures |= {"IL_MCC": mcc, "IL_F1": 2 * tp / (2 * tp + fp + fn)}
    if {"pmF1", "IL_MCC"} <= set(figures):
        figures["cgF1"] = figures["pmF1"] * figures["IL_MCC"]
    return figures


def _presence(asked: set[int], present: set[int], answered: set[int]) -> Presence:
    return Presence(
        len(present & answered),
        len(answered - present),
        len(present - answered),
        len(asked - present - answered),
    )


def _hits(iou: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the matched pairs that reach each of the ten IoU thresholds, (10,)."""
    matched = iou[linear_sum_assignment(-iou)]
    return (matched[:, None] >= IOUS).sum(axis=0)
