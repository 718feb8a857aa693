"""What a model answers → detections: one way for torch, ONNX Runtime and TensorRT, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.inference.detections import Detections
from app.inference.masks import Floats, Whole, encode_masks
from app.inference.merging import merge_tiles, suppress
from app.inference.tiles import make_tiles

THRESHOLD = 0.5  # where the weights say none
Indices = NDArray[np.int64]
Find = Callable[[Sequence[Image.Image]], list[Detections]]  # in each image, seen as a whole


@dataclass(frozen=True)
class Best:
    """The highest scores of one pass of prompts over one image.

    Attributes:
        scores: (N,) float32, 0..1, the highest first.
        prompt_ids: (N,) int64, index into all prompts.
        boxes: (N, 4) float32 cxcywh, 0..1.
        logits: (N, h, w) float32, of the masks; None from a model without a mask head.
    """

    scores: Floats
    prompt_ids: Indices
    boxes: Floats
    logits: Floats | None


def best_queries(scores: Floats, threshold: float, limit: int) -> tuple[Indices, Indices]:
    """Prompt and query of the highest scores (P, Q) above the threshold, at most `limit`."""
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")[:limit]
    order = order[flat[order] > threshold]
    return order // scores.shape[1], order % scores.shape[1]


def to_detections(
    passes: Sequence[Best],
    prompts: tuple[str, ...],
    width: int,
    height: int,
    limit: int,
    plain: Whole | None = None,
) -> Detections:
    """The best of each pass → detections in pixels of the image.

    Args:
        limit: most detections.
        plain: as in `encode_masks`.
    """
    scores = np.concatenate([best.scores for best in passes])
    order = np.argsort(-scores, kind="stable")[:limit]
    boxes = np.concatenate([best.boxes for best in passes])[order]
    size = np.array([width, height] * 2, dtype=np.float32)
    logits = [best.logits for best in passes if best.logits is not None]
    masks = None
    if logits:
        masks = encode_masks(np.concatenate(logits)[order], height, width, plain)
    return Detections(
        boxes_xyxy=(box_cxcywh_to_xyxy(boxes) * size).clip(0, size),
        scores=scores[order],
        prompt_ids=np.concatenate([best.prompt_ids for best in passes])[order],
        prompts=prompts,
        masks=masks,
        width=width,
        height=height,
    )


def box_cxcywh_to_xyxy(boxes: Floats) -> Floats:
    half = np.float32(0.5) * boxes[:, 2:]
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def find_all(
    find: Find,
    images: Sequence[Image.Image],
    *,
    nms: float | None,
    tile: int | None,
    overlap: float,
) -> list[Detections]:
    """What is in each image: seen whole or tile by tile, and each thing once where that is asked.

    Args:
        nms, tile, overlap: as in `Predictor.predict`.
    """
    if tile is None:
        found = find(images)
    else:
        found = [_find_in_tiles(find, image, tile, overlap) for image in images]
    return found if nms is None else [suppress(detections, nms) for detections in found]


def _find_in_tiles(find: Find, image: Image.Image, side: int, overlap: float) -> Detections:
    tiles = make_tiles(image.width, image.height, side, overlap)
    parts = [find([image.crop(tile.box_xyxy)])[0] for tile in tiles]
    return merge_tiles(tiles, parts, image.width, image.height)
