"""Compute COCO's figures of detections beside truth, in parity with pycocotools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval

from app.datasets.coco import Dataset

_AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}  # under 32², under 96², above (pixels)
_LIMITS = {"_1": 0, "_10": 1, "_100": 2}  # detections an image
_FIGURES = [
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100"
]  # fmt: skip


def evaluate(truth: Dataset, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return COCO's figures of boxes, and of masks where the truth and the results have them.

    Args:
        truth: the validation set.
        results: COCO results: image_id, category_id, score, bbox (xywh), segmentation (RLE).

    Returns:
        "bbox/AP", "bbox/AP50", …, "bbox/AP/<class>", likewise "segm/…", each 0..1. A figure that
        the truth does not define (no small objects, say) is left out; without detections AP is 0.
    """
    figures: dict[str, float] = {}
    for iou_type in iou_types(truth, results):
        figures |= _evaluate(truth, results, iou_type)
    return figures


def iou_types(truth: Dataset, results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return what can be scored: boxes, and masks where the truth and all results have them."""
    has_truth = all(annotation.segmentation is not None for annotation in truth.annotations)
    has_masks = has_truth and all("segmentation" in result for result in results)
    return ("bbox", "segm") if has_masks else ("bbox",)


def accumulate(truth: Dataset, results: Sequence[dict[str, Any]], iou_type: str) -> COCOeval:
    """Return COCO's evaluation, evaluated and accumulated."""
    ground_truth = _to_hotcoco(truth)
    # loadRes derives area from segmentation when both are there, and boxes must be scored by boxes.
    other = "bbox" if iou_type == "segm" else "segmentation"
    plain = [{k: v for k, v in r.items() if k != other} if other in r else r for r in results]
    # load_res raises IndexError on an empty list
    detections = (
        ground_truth.load_res(plain) if plain else _to_hotcoco(replace(truth, annotations=()))
    )
    evaluation = COCOeval(ground_truth, detections, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _to_hotcoco(truth: Dataset) -> COCO:
    content = truth.to_json()
    for image in content["images"]:
        image["file_name"] = ""  # which hotcoco refuses where it is not UTF-8
    return COCO(content)


def _evaluate(truth: Dataset, results: Sequence[dict[str, Any]], iou_type: str) -> dict[str, float]:
    if not results:
        return _nothing_found(truth, iou_type)
    evaluation = accumulate(truth, results, iou_type)
    computed: Any = evaluation.eval
    precision = np.asarray(computed["precision"])  # (IoU, recall, class, area, limit)
    recall = np.asarray(computed["recall"])  # (IoU, class, area, limit)
    figures = {f"AP{area}": _mean(precision[:, :, :, i, -1]) for area, i in _AREAS.items()}
    figures |= {"AP50": _mean(precision[0, :, :, 0, -1]), "AP75": _mean(precision[5, :, :, 0, -1])}
    figures |= {f"AR{limit}": _mean(recall[:, :, 0, i]) for limit, i in _LIMITS.items()}
    names = {category.id: category.name for category in truth.categories}
    figures |= {
        f"AP/{names[category_id]}": _mean(precision[:, :, i, 0, -1])
        for i, category_id in enumerate(evaluation.params.cat_ids)
    }
    return {f"{iou_type}/{name}": value for name, value in figures.items() if value is not None}


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that the truth defines; COCO marks the others by -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _nothing_found(truth: Dataset, iou_type: str) -> dict[str, float]:
    present = {annotation.category_id for annotation in truth.annotations}
    names = [f"AP/{category.name}" for category in truth.categories if category.id in present]
    return {f"{iou_type}/{name}": 0.0 for name in [*_FIGURES, *names]}


def by_class(truth: Dataset, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a class: its name, its objects, and AP, AP50, AR_100 of boxes and of masks."""
    objects = Counter(a.category_id for a in truth.annotations if not a.iscrowd)
    rows: dict[int, dict[str, Any]] = {
        c.id: {"class": c.name, "objects": objects[c.id]} for c in truth.categories
    }
    for iou_type in iou_types(truth, results):
        evaluation = accumulate(truth, results, iou_type)
        computed: Any = evaluation.eval
        precision, recall = (np.asarray(computed[key]) for key in ("precision", "recall"))
        for index, category_id in enumerate(evaluation.params.cat_ids):
            figures = {
                "AP": _mean(precision[:, :, index, 0, -1]),
                "AP50": _mean(precision[0, :, index, 0, -1]),
                "AR_100": _mean(recall[:, index, 0, -1]),
            }
            rows[category_id] |= {f"{iou_type}/{name}": value for name, value in figures.items()}
    return list(rows.values())
