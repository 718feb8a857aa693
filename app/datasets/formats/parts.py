"""Objects that a label draws in several parts: one box, or one mask, of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.datasets.coco import Image
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import Rle, polygon_mask, union
from app.datasets.geometry import is_number

Box = list[float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Part:
    """A shape, not yet looked at.

    Attributes:
        group: parts of one label and one group are one object; None for an object of its own.
        value: the shape as it is written, for the problem.
        make: returns the box or the mask; raises ValueError where it is none.
    """

    label: object
    group: object
    place: str
    value: object
    make: Callable[[], Box | Rle]


def add_objects(draft: Draft, image: Image, parts: Iterable[Part]) -> None:
    """Add the objects of an image: of boxes alone a box without a mask, else a mask.

    A part that is no shape leaves out its whole object.
    """
    objects: dict[tuple[str, ...], list[Part]] = {}
    for index, part in enumerate(parts):
        label = part.label.strip() if isinstance(part.label, str) else ""
        if not label:
            remedy = "must be the class's name, as text"
            draft.drop_object("label", f"{part.place}: label", part.label, remedy)
            continue
        group = ("", str(index)) if part.group is None else ("group", repr(part.group))
        objects.setdefault((label, *group), []).append(part)
    for (label, *_), members in objects.items():
        _add(draft, image, label, members)


def _add(draft: Draft, image: Image, label: str, members: list[Part]) -> None:
    boxes: list[Box] = []
    masks: list[Rle] = []
    for part in members:
        try:
            shape = part.make()
            if isinstance(shape, dict):
                masks.append(shape)
            elif len(members) > 1 and not all(map(is_number, shape)):
                raise ValueError("must have finite numbers for its sides")
            else:
                boxes.append(shape)
        except ValueError as fault:
            draft.drop_object("shape", part.place, part.value, str(fault))
            return
    place = members[0].place
    if not masks:
        draft.add_box(image, label, boxes[0] if len(boxes) == 1 else _around(boxes), place)
        return
    try:
        masks += [box_mask(box, image.width, image.height) for box in boxes]
        draft.add_mask(image, label, union(masks), place)
    except ValueError as fault:
        draft.drop_object("shape", place, members[0].value, str(fault))


def box_mask(box: Box, width: int, height: int) -> Rle:
    """Return the mask of a box; raise ValueError where it covers no pixel of the image."""
    x, y, w, h = box
    return polygon_mask([x, y, x + w, y, x + w, y + h, x, y + h], width, height)


def _around(boxes: list[Box]) -> Box:
    left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes)
    right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    return [left, top, right - left, bottom - top]
