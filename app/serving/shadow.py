"""A version that is asked what another has answered, so that they can be compared; no one waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from app.errors import UserError
from app.inference.detections import Detections
from app.inference.outputs import box_xywh
from app.serving.engine import Asked, Engine
from app.serving.refusals import Refused
from app.serving.uploads import Uploaded
from app.serving.versions import Models

MOST = 4  # requests that are asked again at one time; others are not
SAME = 0.5  # IoU of boxes


def compare(
    models: Models,
    engine: Engine,
    images: Sequence[Uploaded],
    asked: Sequence[Asked],
    most: int,
    found: Sequence[Detections],
) -> None:
    """Ask the shadow what `engine` has answered, soon, unless there is none, or much to do."""
    other = models.shadow
    if other is None or other is engine or len(models.comparisons) >= MOST:
        return
    task = asyncio.ensure_future(_ask(other, images, asked, most, found))
    models.comparisons.add(task)
    task.add_done_callback(models.comparisons.discard)


async def _ask(
    other: Engine,
    images: Sequence[Uploaded],
    asked: Sequence[Asked],
    most: int,
    found: Sequence[Detections],
) -> None:
    try:
        queries = other.queries(asked, most)
        for image, ours in zip(images, found, strict=True):
            theirs = await other.find(image, queries)
            other.observer.shadowed(other, agreement(ours, theirs))
    except (Refused, UserError):  # it is full, or cannot be asked this
        other.observer.shadowed(other, None)


def agreement(ours: Detections, theirs: Detections) -> float:
    """Return the share of detections that both have, 0..1: 2 · pairs / all; 1 where both are empty.

    A pair is of one prompt and overlaps by SAME or more. The highest scores are paired first.
    """
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    boxes = ([box_xywh(found, index) for index in range(len(found))] for found in (ours, theirs))
    overlaps = coco_mask.iou(*boxes, [0] * len(theirs))
    free = np.ones(len(theirs), dtype=bool)
    names = np.array([theirs.prompts[int(number)] for number in theirs.prompt_ids])
    pairs = 0
    for row, number in zip(overlaps, ours.prompt_ids, strict=True):
        fitting = np.where(free & (names == ours.prompts[int(number)]), row, 0.0)
        best = int(fitting.argmax())
        if fitting[best] >= SAME:
            free[best] = False
            pairs += 1
    return 2 * pairs / (len(ours) + len(theirs))
