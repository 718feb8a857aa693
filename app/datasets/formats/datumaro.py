"""Datumaro's JSON, as CVAT writes it too: a file a subset, with its items and their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading, compress
from app.datasets.folders import splits_of, subset_folders
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.outlines import Rle, closes, ellipse_mask, polygon_mask
from app.datasets.formats.parts import Box, Part, add_objects
from app.datasets.formats.telling import entries, holding
from app.datasets.geometry import is_int, is_number, rle_fault
from app.datasets.names import Names

PATTERNS = ("*.json", "annotations/*.json")
TAGS = ("label", "caption")  # which mark no place
UNDERSTOOD = "bbox, polygon, mask and ellipse"


def is_datumaro(folder: Path) -> bool:
    """Return whether a JSON with items and categories is in the folder, or in annotations/."""
    return any(_jsons(folder))


def _jsons(folder: Path) -> list[Path]:
    return [
        path
        for pattern in PATTERNS
        for path, document in holding(folder, pattern, "items", "categories", "annotations")
        if document is None or (isinstance(document, dict) and _is_datumaro(document))
    ]


def _is_datumaro(document: dict[str, Any]) -> bool:
    return isinstance(document.get("items"), list) and isinstance(document.get("categories"), dict)


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the names of the files, which are those of their subsets.

    Raises:
        UserError: some names tell a split and others do not.
    """
    folder = folder.resolve()
    paths = _jsons(folder)
    by_split: dict[str, list[Path]] = {}
    told = splits_of((path.stem for path in paths), f"{folder}: the subsets")
    for path in paths:
        by_split.setdefault(told[path.stem], []).append(path)
    return {split: partial(_read, folder, found) for split, found in by_split.items()}


def _read(folder: Path, paths: Sequence[Path]) -> Reading:
    """Read these subsets.

    Shapes of one label and one group are parts of one object; a box beside a mask is that mask's.

    Returns:
        What is sound, and every fault of every shape.
    """
    own = subset_folders(folder, {path.stem for path in paths})
    draft = Draft(folder, names=Names([*own, folder], folder, folder))
    tags = 0
    for path in paths:
        document = draft.read_object(path, "JSON") or {}
        names = _names(document)
        for index, item in enumerate(document.get("items") or []):
            place = f"{draft.place(path)}: items[{index}]"
            if not isinstance(item, dict):
                draft.drop_file("entry", place, item, "must be a JSON object")
                continue
            image = draft.add_named(_path(item), place)
            if image is None:
                continue
            _check_size(draft, image, item, place)
            shapes = [*_shapes(item, place)]
            tags += sum(shape.get("type") in TAGS for _, shape in shapes)
            add_objects(draft, image, _parts(shapes, names, image))
    if tags:
        draft.findings.add("tag", "annotations", f"{tags} labels", "mark no place: passed over")
    return draft.finish()


def _names(document: Mapping[str, Any]) -> list[object]:
    """Return the classes' names by their number."""
    categories = document.get("categories")
    label = categories.get("label") if isinstance(categories, dict) else None
    labels = label.get("labels") if isinstance(label, dict) else None
    return [entry.get("name") for entry in entries(labels)]


def _path(item: dict[str, Any]) -> object:
    """Return the path of an item's image, which is its id where no path is written."""
    media = item.get("image") or item.get("media")
    path = media.get("path") if isinstance(media, dict) else None
    return path or item.get("id")


def _check_size(draft: Draft, image: Image, item: dict[str, Any], place: str) -> None:
    media = item.get("image")
    size = media.get("size") if isinstance(media, dict) else None
    if isinstance(size, list) and len(size) == 2:
        draft.check_size(image, (size[1], size[0]), f"{place}: size")  # height comes first


def _shapes(item: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    found = item.get("annotations")
    for index, shape in enumerate(found if isinstance(found, list) else []):
        spot = f"{place}.annotations[{index}]"
        yield spot, shape if isinstance(shape, dict) else {"type": repr(shape)[:40]}


def _parts(
    shapes: Sequence[tuple[str, dict[str, Any]]], names: Sequence[object], image: Image
) -> Iterator[Part]:
    masked = {_group(shape) for _, shape in shapes if shape.get("type") in ("polygon", "mask")}
    for place, shape in shapes:
        group, number = _group(shape), shape.get("label_id")
        if shape.get("type") in TAGS:
            continue
        if shape.get("type") == "bbox" and group is not None and group in masked:
            continue
        name = names[number] if is_int(number) and 0 <= number < len(names) else None
        value = {key: shape[key] for key in ("type", "bbox", "points", "rle") if key in shape}
        yield Part(name, group, place, value, partial(_shape, shape, image))


def _group(shape: dict[str, Any]) -> tuple[object, ...] | None:
    group = shape.get("group")
    return (group, repr(shape.get("label_id"))) if is_int(group) and group else None


def _shape(shape: dict[str, Any], image: Image) -> Box | Rle:
    kind, size = shape.get("type"), (image.width, image.height)
    if kind == "bbox":
        box = shape.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise ValueError("must have four finite numbers [x, y, width, height]")
        return box
    if kind == "polygon" or (kind == "polyline" and closes(shape.get("points"))):
        return polygon_mask(shape.get("points"), *size)
    if kind == "mask":
        rle = shape.get("rle")
        found = rle if isinstance(rle, dict) else {}
        if fault := rle_fault(found, *size):
            raise ValueError(fault)
        mask = compress(found, *size)
        assert mask is not None
        return mask
    if kind == "ellipse":
        sides = shape.get("points")
        if not isinstance(sides, list) or len(sides) != 4 or not all(map(is_number, sides)):
            raise ValueError("must have four finite numbers: two corners")
        left, top, right, bottom = sides
        center = ((left + right) / 2, (top + bottom) / 2)
        return ellipse_mask(center, ((right - left) / 2, (bottom - top) / 2), *size)
    raise ValueError(f"is a {kind}: understood are {UNDERSTOOD}")
