"""Compute all figures of results: AP, prompted segmentation, off-prompt firing, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.datasets.coco import Dataset
from app.evaluation.calibration import calibrate
from app.evaluation.concepts import concept_figures
from app.evaluation.matching import overlaps
from app.evaluation.metrics import evaluate, iou_types
from app.evaluation.off_prompt import OffPrompts, off_prompt_figures

THRESHOLD = "calibration/threshold"
NO_OFF_PROMPTS = OffPrompts()


def score(
    truth: Dataset,
    results: Sequence[dict[str, Any]],
    *,
    threshold: float,
    off_prompts: OffPrompts = NO_OFF_PROMPTS,
) -> dict[str, float]:
    """Return the figures of `metrics.evaluate`, and beside them, of masks and of boxes:

    "segm/cgF1", "segm/pmF1", "segm/IL_MCC", … (`concepts`), and once, of masks where there are any:
    "off_prompt/firing", … above `threshold` (`off_prompt`), and "calibration/threshold", "…/F1",
    "…/precision", "…/recall" (`calibration`).

    Args:
        truth: the images, each asked for every class.
        results: COCO results.
        threshold: 0..1, above which a detection on an absent thing counts as firing.
        off_prompts: detections on nouns that no image shows.
    """
    figures = evaluate(truth, results)
    categories = [category.id for category in truth.categories]
    others = off_prompts.presence(len(truth.images))
    for iou_type in iou_types(truth, results):
        images = overlaps(truth, results, iou_type)
        concepts = concept_figures(images, categories, others)
        figures |= {f"{iou_type}/{name}": value for name, value in concepts.items()}
    figures |= off_prompt_figures(images, off_prompts, threshold)
    if best := calibrate(images):
        figures |= {
            THRESHOLD: best.threshold,
            "calibration/F1": best.f1,
            "calibration/precision": best.precision,
            "calibration/recall": best.recall,
        }
    return figures
