"""Maps of numbers → the mask of each number, or of each group of pixels that touch."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.formats.outlines import Rle


def encode_numbers(numbers: NDArray[Any]) -> dict[int, Rle]:
    """Return the mask of each number but 0 of a (height, width) map, in their order.

    One pass over the pixels, however many numbers there are.
    """
    height, width = numbers.shape
    flat = numbers.ravel(order="F")
    if not flat.size:
        return {}
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, ends = np.append(0, changes), np.append(changes, flat.size)
    values, owners = np.unique(flat[starts], return_inverse=True)
    order = np.argsort(owners, kind="stable")
    runs_of = np.split(order, np.cumsum(np.bincount(owners))[:-1])
    masks = {}
    for value, runs in zip(values.tolist(), runs_of, strict=True):
        if value:
            bounds = np.stack([starts[runs], ends[runs]], axis=1).ravel()
            counts = np.diff(bounds, prepend=0).tolist()
            if bounds[-1] < flat.size:
                counts.append(int(flat.size - bounds[-1]))
            plain = {"size": [height, width], "counts": counts}
            packed = coco_mask.frPyObjects(plain, height, width)["counts"]
            masks[int(value)] = {"size": [height, width], "counts": packed.decode()}
    return masks


def components(mask: NDArray[np.bool_]) -> list[Rle]:
    """Return the mask of each group of pixels that touch, at corners too."""
    _, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return list(encode_numbers(numbers).values())


def foreground(pixels: NDArray[Any], highest: int | None = None) -> NDArray[np.bool_]:
    """Return where a mask of two values, such as 0 and 1 or 0 and 255, is not 0.

    Above half of the range: smooth edges and lossy files have values between the two.

    Args:
        highest: value of the masks that it belongs to; its own unless given.
    """
    top = pixels.max(initial=0) if highest is None else highest
    return np.asarray(pixels > (top // 2 if top > 127 else 0))
