"""COCO panoptic: a JSON of segments, and PNGs whose colours are the segments' ids.

https://cocodataset.org/#format-data, 4: id = R + 256 G + 65536 B; 0 is void.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.datasets.check import is_id
from app.datasets.coco import Image, Reading
from app.datasets.folders import WORDS
from app.datasets.formats.coco import is_coco
from app.datasets.formats.draft import Draft
from app.datasets.formats.mask_files import MAX_NUMBERS, MaskError, read_mask
from app.datasets.formats.mask_layout import IMAGE_FOLDERS
from app.datasets.formats.mask_meaning import values_of
from app.datasets.formats.pieces import components, encode_numbers
from app.datasets.formats.telling import FEW, entries, few, mentions
from app.datasets.image_files import name_fault
from app.datasets.names import Names, fold, walk_images
from app.errors import UserError
from app.files import read_json

PREFIX = "panoptic"


def find_jsons(folder: Path) -> dict[str, Path]:
    """Return panoptic_<split>.json of each split, in the folder or in annotations/.

    Raises:
        UserError: a name says no split, or two say one.
    """
    found: dict[str, Path] = {}
    paths = [p for place in (folder, folder / "annotations") for p in _jsons(place)]
    for path in paths:
        subset = fold(path.stem)[len(PREFIX) :].strip("_-").rstrip("0123456789")
        split = "train" if len(paths) == 1 else WORDS.get(subset)
        if split is None:
            names = "panoptic_train.json, panoptic_val.json or panoptic_test.json"
            raise UserError(f"{path}: must be {names}; rename it")
        if split in found:
            raise UserError(f"{path}: is for {split}, as {found[split]} is; keep one")
        found[split] = path
    return found


def _jsons(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = (path for path in few(folder, "*.json") if fold(path.name).startswith(PREFIX))
    return [
        path
        for path in named
        if fold(path.name).startswith(f"{PREFIX}_") or mentions(path, "segments_info", "categories")
    ]


def is_panoptic(folder: Path) -> bool:
    """Return whether there is a JSON of segments, and none of objects that is to be read instead.

    annotations/instances_*.json is, and so is any COCO JSON where the PNGs are missing.
    """
    jsons = [*_jsons(folder), *_jsons(folder / "annotations")]
    if not jsons or _has_instances(folder):
        return False
    return any(_has_pngs(path, folder) for path in jsons) or not is_coco(folder)


def _has_instances(folder: Path) -> bool:
    return any(folder.glob("annotations/instances_*.json"))


def passed_over(folder: Path) -> list[str]:
    """Return a note of the JSONs of segments in a folder that is read as COCO's objects."""
    jsons = [*_jsons(folder), *_jsons(folder / "annotations")]
    if not jsons:
        return []
    names = ", ".join(path.name for path in jsons)
    lost = "" if _has_instances(folder) else ", whose PNGs are not there"
    return [f"not read beside COCO's objects: {names} (COCO panoptic){lost}"]


def _has_pngs(path: Path, folder: Path) -> bool:
    """Return whether one of the first PNGs that a JSON names is there."""
    if any(any(walk_images(own, (".png",))) for own in _own_folders(folder, path)):
        return True  # its name tells, and so it need not be parsed
    try:
        document = read_json(path)
    except UserError:
        return True  # so that reading it says what is wrong with it
    masks = Names(_mask_roots(folder.resolve(), path, document), folder.resolve())
    return bool(masks.paths(_png_names(document)[:FEW]))


def _png_names(document: object) -> list[str]:
    listed = document.get("annotations") if isinstance(document, dict) else None
    names = (entry.get("file_name") for entry in entries(listed))
    return [str(name) for name in names if name_fault(name) is None]


def read(path: Path, folder: Path) -> Reading:
    """Read the segments of a split: things are objects, and each piece of stuff is one.

    A segment that is no thing (`isthing` 0), such as sky, has no objects to be told apart: each
    group of its touching pixels is taken for one.
    """
    draft = Draft(folder)
    document = draft.read_object(path, "JSON")
    if document is None:
        return draft.finish()
    if not all(isinstance(document.get(key), list) for key in ("annotations", "categories")):
        remedy = "must have the lists 'annotations' and 'categories', as COCO panoptic has them"
        draft.findings.add("root", draft.place(path), sorted(document)[:5], remedy)
        return draft.finish()
    classes = _categories(document["categories"], draft)
    names = _image_names(document.get("images"))
    roots = _image_roots(folder.resolve(), path)
    draft.names = Names(roots, draft.root, roots[0])
    masks = Names(_mask_roots(draft.root, path, document), draft.root)
    for index, entry in enumerate(document["annotations"]):
        place = f"{draft.place(path)}: annotations[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("segments_info"), list):
            draft.drop_file("entry", place, entry, "must be an object with 'segments_info'")
            continue
        image_id = entry.get("image_id")
        known = names.get(image_id) if is_id(image_id) else None
        name = known or _stem(entry.get("file_name"))
        image = draft.add_named(name, f"{place}.file_name")
        if image is not None:
            _read_segments(draft, image, entry, masks, classes, place)
    return draft.finish()


def _categories(entries: list[Any], draft: Draft) -> dict[int, tuple[str, bool]]:
    """Return the name of each category, and whether it is of things."""
    classes: dict[int, tuple[str, bool]] = {}
    for index, entry in enumerate(entries):
        place = f"categories[{index}]"
        if not isinstance(entry, dict) or not is_id(entry.get("id")) or entry["id"] in classes:
            remedy = "must have an 'id' of its own, a whole number"
            draft.findings.add("category id", place, entry, remedy)
        elif not isinstance(entry.get("name"), str) or not entry["name"].strip():
            remedy = "must be the class's name, as text"
            draft.findings.add("category name", f"{place}.name", entry.get("name"), remedy)
        else:
            classes[entry["id"]] = (entry["name"].strip(), entry.get("isthing", 1) != 0)
    return classes


def _image_names(entries: object) -> dict[int, str]:
    """Return the file name of each image id."""
    return {
        entry["id"]: entry["file_name"]
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and is_id(entry.get("id"))
        and isinstance(entry.get("file_name"), str)
    }


def _stem(name: object) -> object:
    """Return a mask's name without its ending: the image has the same, and another ending."""
    return name.rsplit(".", 1)[0] if isinstance(name, str) and "." in name else name


def _image_roots(folder: Path, path: Path) -> list[Path]:
    subset = path.stem[len(PREFIX) :].strip("_-")
    roots = [folder / "images" / subset, folder / subset]
    roots += [p for p in sorted(folder.iterdir()) if p.is_dir() and fold(p.name) in IMAGE_FOLDERS]
    return [root for root in roots if subset and root.is_dir()] or [folder]


def _mask_roots(root: Path, path: Path, document: object) -> list[Path]:
    """Return the folder of the JSON's name beside it, else the one that holds its first PNG.

    Images may be PNGs of the same names: their folders do not count.
    """
    if found := _own_folders(root, path):
        return found
    key = fold(Path(next(iter(_png_names(document)), "")).name)
    images = {*IMAGE_FOLDERS, *(fold(image.name) for image in _image_roots(root, path))}
    holding = {
        file.parent.resolve()
        for file in walk_images(root, (".png",))
        if fold(file.name) == key
        and not images.intersection(map(fold, file.relative_to(root).parts[:-1]))
    }
    return list(holding) if len(holding) == 1 else [path.parent.resolve()]


def _own_folders(root: Path, path: Path) -> list[Path]:
    """Return the folders that have the name of a JSON."""
    beside = [path.parent / path.stem, root / path.stem, root / "annotations" / path.stem]
    return [folder.resolve() for folder in beside if folder.is_dir()]


def _read_segments(
    draft: Draft,
    image: Image,
    entry: Mapping[str, Any],
    masks: Names,
    classes: Mapping[int, tuple[str, bool]],
    place: str,
) -> None:
    name = entry.get("file_name")
    fault = name_fault(name)
    found = fault or masks.find(str(name))
    if isinstance(found, str):
        draft.drop_image(image, "label file", f"{place}.file_name", name, found)
        return
    try:
        if not draft.contains(found.path, place):
            raise MaskError("its PNG is outside the dataset")
        ids = _ids(found.path, image)
    except MaskError as error:
        draft.drop_image(image, error.kind, draft.place(found.path), str(name), str(error))
        return
    encoded = encode_numbers(ids)
    listed = set()
    for index, segment in enumerate(entry["segments_info"]):
        at = f"{place}.segments_info[{index}]"
        number = segment.get("id") if isinstance(segment, dict) else None
        if not is_id(number) or number not in encoded:
            remedy = "must be the id of a segment that its PNG has"
            draft.drop_object("segmentation", f"{at}.id", number, remedy)
            continue
        listed.add(number)
        category = segment.get("category_id")
        if not is_id(category) or category not in classes:
            remedy = "is the id of no category in 'categories'"
            draft.drop_object("category reference", f"{at}.category_id", category, remedy)
            continue
        crowd = segment.get("iscrowd", 0)
        if crowd not in (0, 1):
            draft.drop_object("iscrowd", f"{at}.iscrowd", crowd, "must be 0 or 1")
            continue
        name, is_thing = classes[category]
        pieces = [encoded[number]] if is_thing else components(ids == number)
        for rle in pieces:
            draft.add_mask(image, name, rle, at, iscrowd=bool(crowd))
    if unlisted := [number for number in encoded if number not in listed]:
        shown = ", ".join(map(str, unlisted[:5]))
        remedy = f"has {len(unlisted)} segments that 'segments_info' lacks ({shown}): left out"
        draft.findings.add("void", draft.place(found.path), found.path.name, remedy)


def _ids(path: Path, image: Image) -> NDArray[np.int32]:
    """Return the (height, width) ids of a PNG: R + 256 G + 65536 B."""
    mask = read_mask(path, (image.width, image.height))
    colors = mask.numbers if mask.colored else mask.painted()
    values = values_of(colors)
    if len(values) > MAX_NUMBERS:
        raise MaskError(f"has {len(values)} different colours: this is no mask")
    red, green, blue = colors >> 16, colors >> 8 & 255, colors & 255
    return np.asarray(red | green << 8 | blue << 16, dtype=np.int32)
