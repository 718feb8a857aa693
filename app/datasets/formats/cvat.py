"""CVAT for images 1.1: one XML of all images, which a root `annotations` tells from VOC's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import split_on_way, splits_of, subset_folders
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.embedded import runs_mask
from app.datasets.formats.outlines import (
    Rle,
    closes,
    ellipse_mask,
    placed_mask,
    polygon_mask,
    turned_box,
)
from app.datasets.formats.parts import Box, Part, add_objects
from app.datasets.formats.telling import few, root_element
from app.datasets.formats.voc import parse_xml
from app.datasets.geometry import MAX_SIDE, is_number, to_number, to_side
from app.datasets.names import Names
from app.errors import UserError

PATTERNS = ("*.xml", "*/*.xml")
UNDERSTOOD = "box, polygon, mask and ellipse"
Entry = ElementTree.Element


def is_cvat(folder: Path) -> bool:
    """Return whether an XML whose root is `annotations` is in the folder, or in one of its own."""
    return any(_xmls(folder))


def _xmls(folder: Path) -> list[Path]:
    return [path for path in few(folder, *PATTERNS) if root_element(path) == "annotations"]


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the images' `subset`, else by the folder of the XML.

    Raises:
        UserError: an XML is broken, or of a video; subsets that are no splits.
    """
    folder = folder.resolve()
    entries, problems = list[tuple[str, Path, Entry]](), []
    for path in _xmls(folder):
        try:
            root = parse_xml(path.read_bytes())
        except (OSError, ValueError) as fault:
            problems.append(f"{path}: {fault}")
            continue
        if root.find("track") is not None:
            problems.append(f"{path}: is CVAT for video: export it as 'CVAT for images 1.1'")
        where = split_on_way(path, folder) or ""
        entries += [(image.get("subset") or where, path, image) for image in root.iter("image")]
    if problems:
        raise UserError(problems)
    told = splits_of((subset for subset, *_ in entries), f"{folder}: the subsets")
    by_split: dict[str, list[tuple[str, Path, Entry]]] = {"train": []} if not entries else {}
    for entry in entries:
        by_split.setdefault(told[entry[0]], []).append(entry)
    return {split: partial(_read, folder, found) for split, found in by_split.items()}


def _read(folder: Path, entries: Sequence[tuple[str, Path, Entry]]) -> Reading:
    """Read these images' entries.

    Shapes of one label and one group are parts of one object, as in CVAT's own COCO export.

    Returns:
        What is sound, and every fault of every shape.
    """
    subsets = dict.fromkeys(subset for subset, *_ in entries)
    own = subset_folders(folder, subsets)
    beside = dict.fromkeys(path.parent for _, path, _ in entries)
    draft = Draft(folder, names=Names([*own, *beside, folder], folder, folder))
    tags = 0
    for _, path, entry in entries:
        place = f"{draft.place(path)}: image {entry.get('name')}"
        image = draft.add_named(entry.get("name"), place)
        if image is None:
            continue
        sides = (to_side(entry.get("width")), to_side(entry.get("height")))
        draft.check_size(image, sides, place)
        shapes = [shape for shape in entry if shape.tag != "tag"]
        tags += len(entry) - len(shapes)
        parts = [_part(shape, i, place, image) for i, shape in enumerate(shapes)]
        add_objects(draft, image, parts)
    if tags:
        draft.findings.add("tag", "<tag>", f"{tags} tags", "mark no place: passed over")
    return draft.finish()


def _part(shape: Entry, index: int, place: str, image: Image) -> Part:
    group = shape.get("group_id")
    return Part(
        label=shape.get("label"),
        group=None if group in (None, "0") else group,
        place=f"{place} {shape.tag}[{index}]",
        value={key: value for key, value in shape.attrib.items() if key != "label"},
        make=partial(_shape, shape, image),
    )


def _shape(shape: Entry, image: Image) -> Box | Rle:
    size = (image.width, image.height)
    if shape.tag == "box":
        left, top, right, bottom = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
        box, (turn,) = [left, top, right - left, bottom - top], _numbers(shape, "rotation")
        center = ((left + right) / 2, (top + bottom) / 2)
        return turned_box(box, turn, center, *size) if turn else box
    if shape.tag in ("polygon", "polyline"):
        points = [pair.split(",") for pair in (shape.get("points") or "").split(";")]
        flat = [_number(side) for pair in points for side in pair]
        if shape.tag == "polygon" or closes(flat):
            return polygon_mask(flat, *size)
    if shape.tag == "ellipse":
        x, y, rx, ry, turn = _numbers(shape, "cx", "cy", "rx", "ry", "rotation")
        return ellipse_mask((x, y), (rx, ry), *size, angle=float(np.radians(turn)))
    if shape.tag == "mask":
        left, top, width, height = (round(n) for n in _numbers(shape, *BOX))
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE) or width * height > _area(image):
            raise ValueError("must be a mask of no more pixels than its image has")
        runs = [to_side(run) for run in (shape.get("rle") or "").split(",")]
        return placed_mask(runs_mask(runs, width, height), left, top, *size)
    raise ValueError(f"is a {shape.tag}: understood are {UNDERSTOOD}")


BOX = ("left", "top", "width", "height")


def _area(image: Image) -> int:
    return image.width * image.height


def _numbers(shape: Entry, *names: str) -> list[float]:
    """Return attributes as numbers; a rotation that is missing is 0."""
    texts = [shape.get(name, "0" if name == "rotation" else "") for name in names]
    return [_number(text) for text in texts]


def _number(text: str) -> float:
    number = to_number(text)
    if not is_number(number):
        raise ValueError("must have finite numbers, in pixels")
    return number
