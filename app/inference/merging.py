"""Merge detections of one object that several prompts found, or several tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from app.datasets.rle import Indices, covered, decode, from_bounds, iou, merge, to_bounds
from app.inference.detections import Detections
from app.inference.masks import bounds_of, place
from app.inference.tiles import Tile

SAME = 0.5  # IoU from which two detections in overlapping tiles are one object
EDGE = 2.0  # pixels; a detection that ends so near its tile's edge may continue beyond it
Part = tuple[Indices, NDArray[np.float32], Tile]  # bounds of its pixels, box_xyxy, where it is seen


def suppress(detections: Detections, limit: float) -> Detections:
    """Drop each detection whose mask (or box, without masks) is that of a higher score.

    Args:
        limit: IoU above which two are one, whatever their prompts.
    """
    regions = _regions(detections)
    chosen: list[int] = []
    for index, region in enumerate(regions):
        if not (iou(region, [regions[other] for other in chosen]) > limit).any():
            chosen.append(index)
    return detections.select(chosen)


def merge_tiles(
    tiles: Sequence[Tile], parts: Sequence[Detections], width: int, height: int
) -> Detections:
    """Merge the detections of the tiles of an image, each object once.

    Two detections of a prompt are one object where their masks agree in what both tiles see of
    them, or where one is cut off by its tile's edge and lies in the other. The merged object has
    the union of the masks and the highest score.

    Args:
        parts: of each tile, in pixels of the tile.
        width, height: of the image, pixels.
    """
    moved = [_move(part, tile, width, height) for tile, part in zip(tiles, parts, strict=True)]
    everything = _concatenate(moved)
    owners = np.repeat(np.arange(len(tiles)), [len(part) for part in moved])
    groups = _groups(everything, [tiles[owner] for owner in owners])
    merged = _concatenate([_join(everything.select(group)) for group in groups] or [everything])
    best = max((part.best_score for part in parts if part.best_score is not None), default=None)
    merged = replace(merged, best_score=best)
    return merged.select(np.argsort(-merged.scores, kind="stable"))


def _regions(detections: Detections) -> list[Indices]:
    """Return the bounds of the masks; without masks, of the pixels with centers in the boxes."""
    if detections.masks is not None:
        return [to_bounds(mask) for mask in detections.masks]
    sides = np.ceil(detections.boxes_xyxy - 0.5).astype(np.int64)
    return [_rectangle(x1, y1, x2, y2, detections.height) for x1, y1, x2, y2 in sides.tolist()]


def _rectangle(left: int, top: int, right: int, bottom: int, height: int) -> Indices:
    filled = np.ones((max(0, bottom - top), max(0, right - left)), dtype=bool)
    return bounds_of(filled, left, top, height)


def _move(part: Detections, tile: Tile, width: int, height: int) -> Detections:
    """Return detections in pixels of a tile as those in pixels of its image."""
    masks = None
    if part.masks is not None:
        masks = [place(decode(mask), tile.left, tile.top, height, width) for mask in part.masks]
    boxes = part.boxes_xyxy + np.array([tile.left, tile.top] * 2, dtype=np.float32)
    return Detections(boxes, part.scores, part.prompt_ids, part.prompts, masks, width, height)


def _concatenate(parts: Sequence[Detections]) -> Detections:
    """Concatenate detections of one image and one list of prompts."""
    first = parts[0]
    return Detections(
        boxes_xyxy=np.concatenate([part.boxes_xyxy for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        prompt_ids=np.concatenate([part.prompt_ids for part in parts]),
        prompts=first.prompts,
        masks=None if first.masks is None else [m for part in parts for m in part.masks or []],
        width=first.width,
        height=first.height,
    )


def _groups(detections: Detections, tiles: Sequence[Tile]) -> list[list[int]]:
    """Group the indices of detections of one object; `tiles` has the tile of each detection."""
    regions = _regions(detections)
    boxes = detections.boxes_xyxy
    group = np.arange(len(detections))
    for index in range(len(detections)):
        near = (boxes[index, :2] <= boxes[:, 2:]).all(1) & (boxes[:, :2] <= boxes[index, 2:]).all(1)
        near &= detections.prompt_ids == detections.prompt_ids[index]
        for other in np.flatnonzero(near[:index]):
            if tiles[index] != tiles[other] and _are_one(
                (regions[index], boxes[index], tiles[index]),
                (regions[other], boxes[other], tiles[other]),
                (detections.width, detections.height),
            ):
                group[group == group[index]] = group[other]
    return [np.flatnonzero(group == number).tolist() for number in np.unique(group)]


def _are_one(one: Part, other: Part, size: tuple[int, int]) -> bool:
    """Return whether two parts are of one object, in an image of this width and height."""
    width, height = size
    shared = one[2].shared(other[2])
    if shared is None:
        return False
    window = _rectangle(*shared.box_xyxy, height)
    parts = [merge([region, window], intersect=True) for region in (one[0], other[0])]
    areas = [covered(part) for part in parts]
    common = covered(merge(parts, intersect=True))
    if common >= SAME * (sum(areas) - common):
        return common > 0
    _, box, tile = one if areas[0] <= areas[1] else other
    return tile.cuts(box.tolist(), width, height, EDGE) and common >= SAME * min(areas) > 0


def _join(same: Detections) -> Detections:
    """Merge detections of one object: the union of their masks, with the highest score."""
    boxes = np.concatenate([same.boxes_xyxy[:, :2].min(0), same.boxes_xyxy[:, 2:].max(0)])
    best = same.select([int(same.scores.argmax())])
    masks = same.masks
    if masks is not None and len(masks) > 1:
        joined = merge([to_bounds(mask) for mask in masks])
        masks = [from_bounds(joined, same.height, same.width)]
    return Detections(
        boxes[None], best.scores, best.prompt_ids, same.prompts, masks, same.width, same.height
    )
