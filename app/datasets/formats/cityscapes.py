"""Cityscapes: leftImg8bit/ and gtFine/<split>/<city>/, as instance ids or as polygons.

https://github.com/mcordts/cityscapesScripts: an instance is class * 1000 + its number; a class
alone marks a group of objects that cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.mask_files import MaskError, read_numbers
from app.datasets.formats.mask_meaning import values_of
from app.datasets.formats.outlines import polygon_mask
from app.datasets.formats.pieces import encode_numbers
from app.datasets.geometry import is_int
from app.errors import UserError
from app.files import read_json

LABELS = "gtFine"
IDS, POLYGONS = f"_{LABELS}_instanceIds.png", f"_{LABELS}_polygons.json"
IMAGES, IMAGE = "leftImg8bit", "_leftImg8bit"
SPLITS = {"train": "train", "valid": "val"}  # the labels of test are not public
# the classes that have instances (cityscapesscripts/helpers/labels.py)
THINGS = {
    **{24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 29: "caravan"},
    **{30: "trailer", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
GROUP = "group"  # after a polygon's label: several objects
MAX_POLYGONS = 10_000  # of an image
NOTES = ("of Cityscapes the 10 classes with instances are read: not road, sky and other stuff",)


def is_cityscapes(folder: Path) -> bool:
    return bool(find_splits(folder))


def find_splits(folder: Path) -> dict[str, Path]:
    """Return gtFine/train and gtFine/val, where they have labels."""
    parts = {split: folder / LABELS / name for split, name in SPLITS.items()}
    return {s: part for s, part in parts.items() if next(_label_files(part), None) is not None}


def _label_files(part: Path) -> Iterator[Path]:
    """Yield the instance ids of each image, or its polygons where it has none."""
    for city in sorted(part.iterdir()) if part.is_dir() else []:
        yield from sorted(city.glob(f"*{IDS}"))
        for path in sorted(city.glob(f"*{POLYGONS}")):
            if not path.with_name(path.name.replace(POLYGONS, IDS)).is_file():
                yield path


def read(part: Path, folder: Path) -> Reading:
    """Read the objects of every labelled image of a split; groups are crowds."""
    draft = Draft(folder)
    root = folder.resolve()
    for path in _label_files(root / part.resolve().relative_to(root)):
        place = draft.place(path)
        name = path.name.removesuffix(IDS).removesuffix(POLYGONS)
        at = root / IMAGES / path.parent.parent.name / path.parent.name
        found = [at / f"{name}{IMAGE}{ending}" for ending in (".png", ".jpg")]
        picture = next((file for file in found if file.is_file()), None)
        if picture is None:
            remedy = f"has no image {name}{IMAGE}.png in {draft.place(at)}; add it"
            draft.drop_file("orphan", place, path.name, remedy)
            continue
        image = draft.add_image(picture, draft.place(picture))
        if image is None:
            continue
        try:
            if not draft.contains(path, place):
                raise MaskError("its labels are outside the dataset")
            if path.name.endswith(IDS):
                numbers = read_numbers(path, image.width, image.height)
                names = {n: THINGS.get(_class(n)) for n in values_of(numbers).tolist()}
                crowds = set(THINGS)
            else:
                numbers, names, crowds = _paint(draft, image, path)
        except MaskError as fault:
            draft.drop_image(image, fault.kind, place, path.name, str(fault))
            continue
        for number, rle in encode_numbers(numbers).items():
            if (own := names.get(number)) is not None:
                crowd = number in crowds
                draft.add_mask(image, own, rle, f"{place} object {number}", iscrowd=crowd)
    return replace(draft.finish(), notes=NOTES)


def _class(number: int) -> int:
    return number // 1000 if number >= 1000 else number


def _paint(
    draft: Draft, image: Image, path: Path
) -> tuple[NDArray[Any], dict[int, str | None], set[int]]:
    """Return a map of the polygons, each over those before it, their classes, and the groups."""
    try:
        document = read_json(path)
    except UserError as error:
        raise MaskError(str(error)) from None
    objects = document.get("objects") if isinstance(document, dict) else None
    if not isinstance(objects, list) or len(objects) > MAX_POLYGONS:
        raise MaskError("must have 'objects', a list of labels and polygons")
    size = document.get("imgWidth"), document.get("imgHeight")
    if all(map(is_int, size)) and size != (image.width, image.height):
        remedy = f"is for {size[0]} x {size[1]} pixels: must be {image.width} x {image.height}"
        raise MaskError(remedy, "other size")
    numbers = np.zeros((image.height, image.width), np.int32)
    names: dict[int, str | None] = {}
    crowds: set[int] = set()
    for index, entry in enumerate(objects, start=1):
        place = f"{draft.place(path)}: objects[{index - 1}]"
        if isinstance(entry, dict) and entry.get("deleted"):
            continue  # as cityscapesscripts passes it over (json2instanceImg.py)
        try:
            label = entry["label"] if isinstance(entry, dict) else None
            points = entry["polygon"] if isinstance(entry, dict) else None
            if not isinstance(label, str) or not isinstance(points, list):
                raise ValueError("must have a label and a polygon")
            flat = [value for point in points for value in _pair(point)]
            mask = coco_mask.decode(polygon_mask(flat, image.width, image.height)) > 0
        except (KeyError, ValueError) as fault:
            draft.drop_object("polygon", place, entry, str(fault))
            continue
        numbers[mask] = index
        plain = label.removesuffix(GROUP)
        names[index] = plain if plain in THINGS.values() else None
        if label.endswith(GROUP):
            crowds.add(index)
    return numbers, names, crowds


def _pair(point: object) -> list[Any]:
    if not isinstance(point, list) or len(point) != 2:
        raise ValueError("must have points of x and y")
    return point
