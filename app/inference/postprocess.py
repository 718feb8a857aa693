"""Turn raw outputs into detections, in numpy, for torch, ONNX Runtime and TensorRT alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.datasets.rle import Indices, Rle
from app.inference.detections import Detections
from app.inference.masks import Floats

THRESHOLD = 0.5  # least score, where the weights name none


@dataclass(frozen=True)
class Candidates:
    """Hold the queries of one image with the highest scores, the highest first.

    Attributes:
        scores: (N,) float32, 0..1.
        prompt_ids: (N,) int64, index into all prompts.
        boxes_cxcywh: (N, 4) float32, 0..1.
        mask_logits: N of (h, w) float32, arrays or tensors where they were computed; None from a
            model without a mask head.
        best_score: the highest score of all queries, also of those that are not among the N.
    """

    scores: Floats
    prompt_ids: Indices
    boxes_cxcywh: Floats
    mask_logits: Sequence[Any] | None
    best_score: float


def best_queries(scores: Floats, threshold: float, limit: int) -> tuple[Indices, Indices]:
    """Return prompt (N,) and query (N,) of the highest scores (P, Q) above the threshold.

    Args:
        limit: most of them.
    """
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")[:limit]
    order = order[flat[order] > threshold]
    return order // scores.shape[1], order % scores.shape[1]


def join_passes(passes: Sequence[Candidates], limit: int) -> Candidates:
    """Return the highest scores of all passes of prompts over one image, at most `limit`."""
    scores = np.concatenate([each.scores for each in passes])
    order = np.argsort(-scores, kind="stable")[:limit]
    logits = [mask for each in passes for mask in each.mask_logits or ()]
    has_masks = passes[0].mask_logits is not None
    return Candidates(
        scores=scores[order],
        prompt_ids=np.concatenate([each.prompt_ids for each in passes])[order],
        boxes_cxcywh=np.concatenate([each.boxes_cxcywh for each in passes])[order],
        mask_logits=[logits[index] for index in order] if has_masks else None,
        best_score=max(each.best_score for each in passes),
    )


def to_detections(
    candidates: Candidates,
    masks: list[Rle] | None,
    prompts: tuple[str, ...],
    width: int,
    height: int,
) -> Detections:
    """Return candidates as detections in pixels of an image (width, height).

    Args:
        masks: of the N candidates, of the image's size; None without a mask head.
    """
    size = np.array([width, height] * 2, dtype=np.float32)
    return Detections(
        boxes_xyxy=(box_cxcywh_to_xyxy(candidates.boxes_cxcywh) * size).clip(0, size),
        scores=candidates.scores,
        prompt_ids=candidates.prompt_ids,
        prompts=prompts,
        masks=masks,
        width=width,
        height=height,
        best_score=candidates.best_score,
    )


def threshold_below(score: float) -> str:
    """Return the score rounded down to two digits: a threshold that shows what has this score."""
    digits = max(2, 1 - math.floor(math.log10(score)))
    step = 10.0**digits
    return f"{math.floor(score * step - 1e-6) / step:g}"


def box_cxcywh_to_xyxy(boxes: Floats) -> Floats:
    """Return boxes (N, 4) by their corners instead of their centers and sides."""
    half = np.float32(0.5) * boxes[:, 2:]
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
