"""LabelMe: a JSON for each image, with its `shapes`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import Rle, ellipse_mask, polygon_mask, union
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

Point = tuple[float, float]


def is_labelme(folder: Path) -> bool:
    """Return whether the first JSON in the folder is LabelMe's."""
    first = min(folder.glob("*.json"), default=None)
    try:
        document = read_json(first) if first else None
    except UserError:
        return False
    return isinstance(document, dict) and isinstance(document.get("shapes"), list)


def read(folder: Path, root: Path, _: ReadingConfig) -> Reading:
    """Read every JSON in `folder`; images without one are not part of the dataset.

    Shapes of one label and one `group_id` are parts of one object. An object of rectangles alone
    has a box and no mask. `imageData` is ignored: the image file is read.

    Returns:
        What is sound, and every fault of every file.
    """
    draft = Draft(root, names=Names([folder.resolve()], root.resolve()))
    for path in sorted(folder.resolve().glob("*.json")):
        document = draft.read_object(path)
        if document is not None:
            _read_document(draft, path, document)
    return draft.finish()


def _read_document(draft: Draft, path: Path, document: dict[str, Any]) -> None:
    place, name, shapes = draft.place(path), document.get("imagePath"), document.get("shapes")
    if not isinstance(name, str) or not name:
        draft.drop_file("file name", f"{place}: imagePath", name, "must name the image")
        return
    if not isinstance(shapes, list):
        draft.drop_file(
            "label file", f"{place}: shapes", shapes, "must be a list, as LabelMe has it"
        )
        return
    image = draft.add_named(name, f"{place}: imagePath")
    if image is None:
        return
    size = (document.get("imageWidth"), document.get("imageHeight"))
    draft.check_size(image, size, f"{place}: imageWidth and imageHeight")
    for label, members in _group(draft, shapes, place):
        _add_object(draft, image, label, members)


def _group(
    draft: Draft, shapes: list[Any], place: str
) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Return the label, and each part with its place, of every object."""
    objects: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for index, shape in enumerate(shapes):
        spot = f"{place}: shapes[{index}]"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            draft.drop_object("label", f"{spot}.label", label, "must be the class's name, as text")
            continue
        group = shape.get("group_id")
        key = (label, "alone", index) if group is None else (label, "group", repr(group))
        objects.setdefault(key, []).append((spot, shape))
    return [(str(key[0]), members) for key, members in objects.items()]


def _add_object(
    draft: Draft, image: Image, label: str, members: list[tuple[str, dict[str, Any]]]
) -> None:
    masks: list[Rle] = []
    corners: list[Point] = []
    boxes_only = all(shape.get("shape_type") == "rectangle" for _, shape in members)
    for spot, shape in members:
        try:
            points = _points(shape.get("points"))
            if boxes_only:
                corners += _rectangle(points)
            else:
                masks.append(_mask(shape.get("shape_type", "polygon"), points, image))
        except ValueError as fault:
            draft.drop_object("shape", spot, shape.get("points"), str(fault))
            return
    if boxes_only:
        (left, top), (right, bottom) = _rectangle(corners)
        draft.add_box(image, label, [left, top, right - left, bottom - top], members[0][0])
    else:
        draft.add_mask(image, label, union(masks), members[0][0])


def _points(points: object) -> list[Point]:
    """Return pairs of x and y in pixels; raise ValueError where they are none."""
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_finite, point))
        for point in points
    ):
        raise ValueError("must have points that are pairs of finite numbers [x, y]")
    return [(float(x), float(y)) for x, y in points]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _rectangle(points: list[Point]) -> list[Point]:
    """Return the upper left and lower right corner around two or more corners."""
    if len(points) < 2:
        raise ValueError("must have two corners; delete or redraw it")
    xs, ys = zip(*points, strict=True)
    return [(min(xs), min(ys)), (max(xs), max(ys))]


def _mask(kind: object, points: list[Point], image: Image) -> Rle:
    size = (image.width, image.height)
    if kind == "polygon":
        return polygon_mask([side for point in points for side in point], *size)
    if kind == "rectangle":
        (left, top), (right, bottom) = _rectangle(points)
        return polygon_mask([left, top, right, top, right, bottom, left, bottom], *size)
    if kind == "circle":
        if len(points) != 2:
            raise ValueError("must have its centre and one point of the circle")
        radius = math.dist(*points)
        return ellipse_mask(points[0], (radius, radius), *size)
    raise ValueError(f"has shape_type {kind!r}: understood are polygon, rectangle and circle")
