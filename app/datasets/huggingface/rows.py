"""A row → its labelled objects, once it is settled how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from app.datasets.formats.outlines import Rle, encode
from app.datasets.formats.pieces import components, foreground
from app.datasets.geometry import box_fault, clip_box
from app.datasets.huggingface.boxes import to_xywh
from app.datasets.huggingface.columns import FIELDS, Columns
from app.datasets.huggingface.masks import (
    Numbers,
    map_channel,
    read_bytes,
    read_map,
    shape_mask,
)
from app.datasets.huggingface.names import Names

Report = Callable[[str, object, str], None]  # what it is, its value, what is wrong with it


@dataclass(frozen=True)
class Reading:
    """Everything decided about how to read the rows.

    Attributes:
        boxes: their convention; None where no object needs one.
        shares: whether polygons are in shares of the image's width and height.
        reasons: what was decided by evidence, to be printed.
        roots: what the address of an image must start with to be read.
    """

    columns: Columns
    names: Names
    boxes: str | None
    shares: bool
    reasons: tuple[str, ...]
    roots: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """One object: its box in pixels, its mask where there is one."""

    name: str
    bbox_xywh: tuple[float, float, float, float]
    mask: Rle | None
    iscrowd: bool = False

    @property
    def area(self) -> float:
        """Return the square pixels: the mask's, else the box's."""
        if self.mask is not None:
            return float(coco_mask.area(self.mask))
        return self.bbox_xywh[2] * self.bbox_xywh[3]


def read_row(
    row: dict[str, Any], reading: Reading, width: int, height: int, report: Report
) -> list[Labelled]:
    """Return the objects of a row whose image has that size; report those that are faulty."""
    columns = reading.columns
    if columns.instances or columns.semantic or columns.mask:
        return _read_maps(row, reading, width, height, report)
    objects = []
    for index, fields in enumerate(objects_of(row, columns)):
        try:
            objects.append(_read_object(fields, reading, width, height))
        except ValueError as fault:
            report(f"object {index}", fields, str(fault))
    return objects


def objects_of(row: dict[str, Any], columns: Columns) -> list[dict[str, Any]]:
    """Return the fields of each object by role (bbox, category, …); none where labels are maps.

    Handles both a list of structs and a struct of lists.
    """
    named = {role: name for role in FIELDS if (name := getattr(columns, role))}
    held = row if columns.objects is None else row[columns.objects]
    if not named or held is None:
        return []
    if isinstance(held, list):
        return [{role: (one or {}).get(name) for role, name in named.items()} for one in held]
    lists = {role: held[name] or [] for role, name in named.items()}
    count = max(map(len, lists.values()))
    return [
        {role: values[index] if index < len(values) else None for role, values in lists.items()}
        for index in range(count)
    ]


def _read_object(fields: dict[str, Any], reading: Reading, width: int, height: int) -> Labelled:
    name = reading.names.of(fields.get("category"))
    crowd = bool(fields.get("iscrowd"))
    shape = fields.get("segmentation")
    mask = shape_mask(shape, width, height, shares=reading.shares, roots=reading.roots)
    if mask is not None:
        return _masked(name, mask, crowd)
    numbers = np.asarray(fields.get("bbox"), dtype=object)
    if numbers.shape != (4,) or any(number is None for number in numbers):
        raise ValueError("has no shape, and no box of four numbers")
    size = np.array([[width, height]], dtype=np.float64)
    boxes = numbers.astype(np.float64)[None]
    box = to_xywh(boxes, size, reading.boxes or "xywh")[0].tolist()
    if fault := box_fault(box, width, height):
        raise ValueError(fault[1])
    return Labelled(name, clip_box(box, width, height), None, crowd)


def _masked(name: str, mask: Rle, crowd: bool = False) -> Labelled:
    x, y, w, h = coco_mask.toBbox(mask).tolist()
    return Labelled(name, (x, y, w, h), mask, crowd)


def _read_maps(
    row: dict[str, Any], reading: Reading, width: int, height: int, report: Report
) -> list[Labelled]:
    columns = reading.columns

    def numbers(column: str, channel: int) -> Numbers:
        pixels = read_map(read_bytes(row[column], reading.roots))
        return map_channel(pixels, channel, width, height)

    try:
        classes = numbers(columns.semantic, 0) if columns.semantic else None
        if columns.instances:
            return list(_instances(numbers(columns.instances, 1), classes, reading.names))
        if classes is not None:
            return list(_classes(classes, reading.names, report))
        assert columns.mask is not None
        mask = foreground(numbers(columns.mask, 0))
        return [_masked(reading.names.of(None), part) for part in components(mask)]
    except ValueError as fault:
        report("map", columns.instances or columns.semantic or columns.mask, str(fault))
        return []


def _instances(numbers: Numbers, classes: Numbers | None, names: Names) -> Iterator[Labelled]:
    """Return an object for each number but 0; its class is the most frequent of its pixels."""
    for number in np.unique(numbers[numbers != 0]):
        mask = numbers == number
        kind = None if classes is None else int(np.bincount(classes[mask]).argmax())
        if kind is None or not names.is_background(kind):
            yield _masked(names.of(kind), encode(mask))


def _classes(numbers: Numbers, names: Names, report: Report) -> Iterator[Labelled]:
    """Return an object for each group of pixels of one class that touch."""
    for number in np.unique(numbers).tolist():
        if names.is_background(number):
            continue
        try:
            name = names.of(number)
        except ValueError as fault:
            report("class", number, str(fault))
            continue
        for part in components(numbers == number):
            yield _masked(name, part)
