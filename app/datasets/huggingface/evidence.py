"""Read the first rows: they decide what the columns' types and names leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from app.datasets.huggingface.boxes import decide
from app.datasets.huggingface.columns import Columns
from app.datasets.huggingface.hub import explained
from app.datasets.huggingface.masks import (
    is_pixels,
    open_picture,
    polygons,
    read_bytes,
    read_map,
    upright_size,
)
from app.datasets.huggingface.names import ONE_CLASS, Names
from app.datasets.huggingface.rows import Reading, objects_of
from app.errors import UserError

ROWS = 100  # a split
MOST_NUMBERS = 1000  # of a map, remembered


@dataclass
class Evidence:
    """Samples of what the columns leave undecided.

    Attributes:
        boxes, sizes: four numbers each; width and height of their image, pixels.
        reach: the largest coordinate of a polygon.
        numbers: the values of the map that is undecided.
    """

    boxes: list[list[float]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    reach: float = 0.0
    numbers: set[int] = field(default_factory=set)
    lossy: bool = False


def gather(
    splits: Mapping[str, Any], columns: Columns, roots: tuple[str, ...], where: str
) -> Evidence:
    """Look at the first rows of each split; what cannot be read is passed over here."""
    evidence = Evidence()
    for rows in splits.values():
        with explained(where):
            for row in islice(rows, ROWS):
                try:
                    _look(row, columns, evidence, roots)
                except ValueError:
                    continue  # the conversion reads it again, and reports it
    return evidence


def _look(
    row: dict[str, Any], columns: Columns, evidence: Evidence, roots: tuple[str, ...]
) -> None:
    if columns.undecided:
        data = read_bytes(row[columns.undecided], roots)
        evidence.lossy |= open_picture(data).format == "JPEG"
        if len(evidence.numbers) < MOST_NUMBERS:
            evidence.numbers |= set(np.unique(read_map(data)).tolist())
    if not (objects := objects_of(row, columns)):
        return
    size = upright_size(open_picture(read_bytes(row[columns.image], roots)))
    for fields in objects:
        shape = fields.get("segmentation")
        if isinstance(shape, list | str) and shape:
            if not is_pixels(shape, *size):
                evidence.reach = max(
                    [evidence.reach, *(abs(n) for p in polygons(shape) for n in p)]
                )
        elif not shape and fields.get("bbox") is not None:
            box = np.asarray(fields["bbox"], dtype=np.float64)
            if box.shape == (4,) and np.isfinite(box).all():
                evidence.boxes.append(box.tolist())
                evidence.sizes.append(size)


def settle(
    columns: Columns,
    choice: Mapping[str, str],
    evidence: Evidence,
    names: Names,
    roots: tuple[str, ...],
    where: str,
) -> Reading:
    """Decide what is open: by `choice` where it says so, else by the evidence.

    Raises:
        UserError: the evidence does not tell; says what was seen, and how to say it by hand.
    """
    reasons = []
    if columns.undecided:
        columns, reason = _settle_map(columns, evidence, names, where)
        reasons.append(reason)
    if (columns.mask or (columns.instances and not columns.semantic)) and names.single is None:
        raise UserError(f"{where}: nothing names the class of its objects. {ONE_CLASS}")
    if columns.semantic and not names.listed():
        raise UserError(
            f"{where}: '{columns.semantic}' holds numbers of classes, and nothing names them. Name "
            "them: --columns 'names=1:cat;2:dog'"
        )
    boxes = choice.get("boxes")
    if evidence.boxes and boxes is None:
        boxes, reason = _settle_boxes(columns, evidence, where)
        reasons.append(reason)
    shares = 0 < evidence.reach <= 1.01
    if shares:
        reasons.append("polygons are read as shares of width and height: none goes beyond 1")
    return Reading(columns, names, boxes, shares, tuple(reasons), roots)


def _settle_boxes(columns: Columns, evidence: Evidence, where: str) -> tuple[str, str]:
    boxes, sizes = np.array(evidence.boxes), np.array(evidence.sizes, dtype=np.float64)
    try:
        convention, reason = decide(boxes, sizes, columns.bbox or "")
    except ValueError as error:
        raise UserError(
            f"{where}: cannot tell what the four numbers of '{columns.bbox}' are: {error}. Say it "
            f"by hand: --columns boxes=xywh, or xyxy, cxcywh; xywhn, xyxyn, cxcywhn for shares of "
            "the image's size"
        ) from None
    return convention, f"boxes are read as {convention}: {reason}"


def _settle_map(
    columns: Columns, evidence: Evidence, names: Names, where: str
) -> tuple[Columns, str]:
    """Decide what the map holds: classes if its numbers have names, one class if it has two."""
    column, numbers = columns.undecided, sorted(evidence.numbers)
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    objects = [number for number in numbers if not names.is_background(number)]
    if names.by_id and objects and all(number in names.by_id for number in objects):
        chosen, reason = "semantic", f"'{column}' is read as classes: its numbers have names"
    elif evidence.lossy or (numbers[:1] == [0] and len(numbers) <= 2):
        chosen, reason = "mask", f"'{column}' is read as a mask of one class: it holds {shown}"
    else:
        raise UserError(
            f"{where}: cannot tell what '{column}' holds: {shown}. Where they are classes: "
            f"--columns 'semantic={column},names=1:cat;2:dog'; where each is an object of one "
            f"class: --columns instances={column},name=cat"
        )
    decided: dict[str, Any] = {chosen: column, "undecided": None}
    return replace(columns, **decided), reason
