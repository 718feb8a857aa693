"""How much detections and objects of an image overlap: what all but AP is counted from."""

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
    """One image: D detections, highest score first, and G objects.

    Attributes:
        image_id: the image.
        results: the D detections, as COCO results.
        scores: (D,) float, 0..1.
        found: (D,) category ids.
        objects: (G,) category ids.
        crowds: (G,) bool; a crowd is neither to be found nor wrong to find.
        iou: (D, G) 0..1, of any classes; with a crowd, the share of the detection inside it.
    """

    image_id: int
    results: Sequence[dict[str, Any]]
    scores: NDArray[np.float64]
    found: NDArray[np.int64]
    objects: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    iou: NDArray[np.float64]

    def outcomes(self, iou_threshold: float = 0.5) -> NDArray[np.int64]:
        """(D,) the object that each detection finds; MISSES where none, CROWD where a crowd.

        As COCO matches: the higher score chooses first, the best free object of its class.
        """
        chosen = np.full(len(self.scores), MISSES)
        free = ~self.crowds
        for index, category in enumerate(self.found):
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
    """The overlaps of each image of `truth`, in its order.

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
        found = [result["segmentation"] for result in ordered]
    else:
        shapes = [list(a.bbox_xywh) for a in objects]
        found = [result["bbox"] for result in ordered]
    iou = coco_mask.iou(found, shapes, crowds) if found and shapes else []
    return Overlaps(
        image_id=image_id,
        results=ordered,
        scores=np.array([result["score"] for result in ordered], dtype=np.float64),
        found=np.array([result["category_id"] for result in ordered], dtype=np.int64),
        objects=np.array([a.category_id for a in objects], dtype=np.int64),
        crowds=np.array(crowds, dtype=bool),
        iou=np.asarray(iou, dtype=np.float64).reshape(len(found), len(shapes)),
    )
