"""Boxes that are not COCO's x y width height in pixels: the evidence, and the conversion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from app.datasets.geometry import clip_box

Box = Sequence[float]
Size = tuple[int, int]  # of the image: width and height, pixels
SLACK = 1.0  # pixels; exports round
LIKE, UNLIKE, FAR = 0.9, 0.8, 0.5  # IoU of a box with its mask's
FEWEST = 10  # boxes that say by themselves that they are centers and sizes

# What `dataset.reading.boxes` names -> the same box as x y width height in pixels
TO_XYWH: dict[str, Callable[[Box, Size], list[float]]] = {
    "xywh": lambda box, _: list(box),
    "xyxy": lambda box, _: [box[0], box[1], box[2] - box[0], box[3] - box[1]],
    "cxcywh": lambda box, _: _around(*box),
    "shares": lambda box, size: _scaled(box, size),
    "cxcywh-shares": lambda box, size: _around(*_scaled(box, size)),
}


def _around(x: float, y: float, w: float, h: float) -> list[float]:
    return [x - w / 2, y - h / 2, w, h]


def _scaled(box: Box, size: Size) -> list[float]:
    return [side * size[axis % 2] for axis, side in enumerate(box)]


def nearest(box: Box, mask_xywh: Box, size: Size, name: str) -> Box:
    """Return the box as `name` reads it, or as it stands where that is nearer to its mask's."""
    return max((TO_XYWH[name](box, size), box), key=lambda read: _overlap(read, mask_xywh, size))


def possible(boxes: Sequence[tuple[Box, Size]]) -> list[str]:
    """Return the conventions that all of these boxes can have: each then lies in its image."""
    return [name for name in TO_XYWH if _can_be(name, boxes)]


def _can_be(name: str, boxes: Sequence[tuple[Box, Size]]) -> bool:
    read = ((TO_XYWH[name](box, size), size) for box, size in boxes)
    return all(min(box[2:]) > 0 and _fits(box, size) for box, size in read)


def misfit(box: Box, mask_xywh: Box, size: Size, names: Collection[str]) -> str | None:
    """Return why a box cannot be that of its mask, as a remedy; None where it can.

    Args:
        names: conventions that may be advised, as the boxes without a mask can have them as well.
    """
    overlap = _overlap(box, mask_xywh, size)
    if overlap >= UNLIKE:
        return None
    read = (n for n in TO_XYWH if _overlap(TO_XYWH[n](box, size), mask_xywh, size) > LIKE)
    name = next(read, None)
    if name is not None and name in names:
        return _is_as(name)
    if name is None and overlap >= FAR:
        return None
    shown = [round(side, 1) for side in mask_xywh]
    return f"is far from its mask, whose box is {shown}: --boxes masks takes the masks' boxes"


def convention(boxes: Sequence[tuple[Box, Size]]) -> str | None:
    """Return why boxes without masks, each with its image's size, are not x y width height.

    The same is said of all of them; None where they can be x y width height. Shares of the image
    lie in 0..1. Corners, or centers and sizes, are inside their images when read so, and leave them
    as x y width height: three in four true corners do, and centers now and then.
    """
    if not boxes:
        return None
    if all(min(box) >= 0 and max(box) <= 1 for box, _ in boxes):
        centered = all(_fits(TO_XYWH["cxcywh-shares"](box, size), size) for box, size in boxes)
        leaving = any(leaves(_scaled(box, size), size) for box, size in boxes)
        return _is_as("cxcywh-shares" if centered and leaving else "shares")
    leaving_boxes = sum(leaves(box, size) for box, size in boxes)
    for name, needed in (("xyxy", max(1, len(boxes) / 4)), ("cxcywh", max(2, len(boxes) / 50))):
        if name == "cxcywh" and len(boxes) < FEWEST:
            continue
        if leaving_boxes >= needed and _can_be(name, boxes):
            return _is_as(name)
    return None


def _is_as(name: str) -> str:
    meaning = {
        "xywh": "x, y, width, height",
        "xyxy": "two corners",
        "cxcywh": "center and size",
        "shares": "shares of the image, 0 to 1",
        "cxcywh-shares": "center and size as shares of the image, 0 to 1",
    }[name]
    return f"is {meaning}, as it seems, and COCO's is x, y, width, height: --boxes {name} reads it"


def leaves(box: Box, size: Size) -> bool:
    """Return whether an xywh box leaves its image by more than rounding does."""
    x, y, w, h = box
    return min(x, y) < -SLACK or x + w > size[0] + SLACK or y + h > size[1] + SLACK


def _fits(box: Box, size: Size) -> bool:
    return not leaves(box, size)


def _overlap(one: Box, other: Box, size: Size) -> float:
    """Return the intersection over union of a box, cut off at its image, and its mask's; xywh.

    It is 0 where one has no width or height.
    """
    one = clip_box(one, *size)
    if min(*one[2:], *other[2:]) <= 0:
        return 0.0
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)
