"""How far exported graphs are from the model that they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.deploy.graphs import FEATURES
from app.deploy.runtime.golden import cosine_of
from app.deploy.runtime.manifest import Tolerance
from app.inference.predictor import Predictor, query_scores

Outputs = Mapping[str, NDArray[np.float32]]  # of a pass, named as by `model_outputs`

# What each precision is held to: some three times of what was measured on nano and small.
TOLERANCES = {
    "fp32": Tolerance(cosine=0.99999, scores=1e-4, boxes=1e-4, mask_iou=0.999),
    "fp16": Tolerance(cosine=0.999, scores=0.02, boxes=0.01, mask_iou=0.98),
    "bf16": Tolerance(cosine=0.995, scores=0.1, boxes=0.03, mask_iou=0.95),
    "int8": Tolerance(cosine=0.98, scores=0.2, boxes=0.05, mask_iou=0.9),
}


@dataclass(frozen=True)
class Difference:
    """What a `Tolerance` limits, as measured, and on how much.

    Attributes:
        cosine: the least of all feature maps.
        scores: the largest difference of a score, or of the presence that is in it.
        boxes: the largest difference of a side, as a share of the image's.
        mask_iou: the mean IoU of a mask.
        objects: boxes and masks that were compared.
        images: that were looked at.
    """

    cosine: float = 1.0
    scores: float = 0.0
    boxes: float = 0.0
    mask_iou: float = 1.0
    objects: int = 0
    images: int = 0

    def join(self, other: Difference) -> Difference:
        objects = self.objects + other.objects
        iou = self.mask_iou * self.objects + other.mask_iou * other.objects
        return Difference(
            cosine=min(self.cosine, other.cosine),
            scores=max(self.scores, other.scores),
            boxes=max(self.boxes, other.boxes),
            mask_iou=iou / objects if objects else 1.0,
            objects=objects,
            images=self.images + other.images,
        )

    def misses(self, tolerance: Tolerance) -> list[str]:
        """`scores differ by 0.3 (at most 0.1)`, for each that is out of bounds, or no number."""
        problems = []
        for field in fields(tolerance):
            value, limit = getattr(self, field.name), getattr(tolerance, field.name)
            least = field.name in ("cosine", "mask_iou")
            if not (value >= limit if least else value <= limit):
                bound = "at least" if least else "at most"
                problems.append(f"{field.name} {value:.6g} ({bound} {limit:g})")
        return problems

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def model_outputs(predictor: Predictor, image: Image.Image, prompts: Sequence[str]) -> Outputs:
    """What the model itself answers: features, and for P prompts every query.

    Returns:
        `fpn0`…`fpn2` and `position` (1, D, side, side), `scores` (P, Q), `presence` (P,), `boxes`
        (P, Q, 4) cxcywh, 0..1, and where there is a mask head `masks` (P, Q, h, w) logits.
    """
    features, answers = predictor.answers(image, prompts)
    maps = [*features["backbone_fpn"], features["vision_pos_enc"][-1]]
    found = dict(zip(FEATURES, maps, strict=True))
    found |= {"scores": query_scores(answers), "boxes": answers["pred_boxes"]}
    found["presence"] = answers["presence_logit_dec"].reshape(-1).sigmoid()
    if "pred_masks" in answers:
        found["masks"] = answers["pred_masks"]
    return {name: value.float().cpu().numpy() for name, value in found.items()}


def compare(
    truth: Outputs, found: Outputs, *, top: int | None = None, above: float = 0.0
) -> Difference:
    """One image: what the model answers beside what the graphs do.

    Args:
        top: how many queries a prompt the graphs answer for, as of `Manifest`.
        above: score from which the model has found something, so that its box and mask count.
    """
    scores, boxes, masks = truth["scores"], truth["boxes"], truth.get("masks")
    if top is not None:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        scores = np.take_along_axis(scores, best, 1)
        boxes = np.take_along_axis(boxes, best[..., None], 1)
        masks = None if masks is None else np.take_along_axis(masks, best[..., None, None], 1)
    seen = scores > above
    iou = 1.0
    if masks is not None and seen.any():
        iou = _mean_iou(masks[seen] > 0, found["masks"][seen] > 0)
    return Difference(
        cosine=min(cosine_of(truth[name], found[name]) for name in FEATURES),
        scores=max(
            _largest(scores, found["scores"]), _largest(truth["presence"], found["presence"])
        ),
        boxes=_largest(boxes[seen], found["boxes"][seen]),
        mask_iou=iou,
        objects=int(seen.sum()),
        images=1,
    )


def _largest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max(initial=0.0))


def _mean_iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    both = (one & other).sum((1, 2))
    either = (one | other).sum((1, 2))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())
