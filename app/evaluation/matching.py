"""Match detections and objects by their overlap; all figures but AP are counted from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.coco import Dataset


@dataclass(frozen=True)
class Overlaps:
    """Hold D detections of an image, the highest score first, its G objects, and their overlaps.

    Attributes:
        image_id: the image.
        results: the D detections, as COCO results.
        scores: (D,) float, 0..1.
        detected: (D,) category ids of the detections.
        objects: (G,) category ids of the objects.
        crowds: (G,) bool; a crowd counts neither as missed nor as a false positive.
        iou: (D, G) 0..1, of any classes; with a crowd, the share of the detection inside it.
    """

    image_id: int
    results: Sequence[dict[str, Any]]
    scores: NDArray[np.float64]
    detected: NDArray[np.int64]
    objects: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    iou: NDArray[np.float64]

    def outcomes(self, iou_threshold: float = 0.5) -> NDArray[np.int64]:
        """Return the object (D,) that each detection finds; MISSES where none, CROWD where a crowd.

        The matching is COCO's: the higher score chooses first, the best free object of its class.
        """
        chosen = np.full(len(self.scores), MISSES)
        free = ~self.crowds
        for index, category in enumerate(self.detected):
            same = (self.objects == category) & (self.iou[index] >= iou_threshold)
            if (candidates := np.flatnonzero(same & free)).size:
                best = candidates[self.iou[index, candidates].argmax()]
                chosen[index], free[best] = best, False
            elif (same & self.crowds).any():
                chosen[index] = CROWD
        return chosen


MISSES, CROWD = -1, -2


def overlaps(
    truth: Dataset, results: Sequence[dict[str, Any]], iou_type: str
) -> tuple[Overlaps, ...]:
    """Return the overlaps of each image of `truth`, in its order.

    Args:
        iou_type: bbox, or segm, for which all annotations and results must have masks.
    """
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        grouped[result["image_id"]].append(result)
    return tuple(_overlaps(truth, image.id, grouped[image.id], iou_type) for image in truth.images)


def _overlaps(
    truth: Dataset, image_id: int, results: list[dict[str, Any]], iou_type: str
) -> Overlaps:
    ordered = sorted(results, key=lambda result: -result["score"])
    objects = truth.annotations_by_image[image_id]
    crowds = [annotation.iscrowd for annotation in objects]
    if iou_type == "segm":
        shapes: list[Any] = [a.segmentation for a in objects]
        detections = [result["segmentation"] for result in ordered]
    else:
        shapes = [list(a.bbox_xywh) for a in objects]
        detections = [result["bbox"] for result in ordered]
    iou = coco_mask.iou(detections, shapes, crowds) if detections and shapes else []
    iou = np.nan_to_num(np.asarray(iou, dtype=np.float64))  # two boxes of no size share 0 of 0
    return Overlaps(
        image_id=image_id,
        results=ordered,
        scores=np.array([result["score"] for result in ordered], dtype=np.float64),
        detected=np.array([result["category_id"] for result in ordered], dtype=np.int64),
        objects=np.array([a.category_id for a in objects], dtype=np.int64),
        crowds=np.array(crowds, dtype=bool),
        iou=iou.reshape(len(detections), len(shapes)),
    )
