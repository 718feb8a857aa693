"""Every fault of a COCO JSON, found before anything trusts it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from app.datasets.faults import Findings
from app.datasets.geometry import (
    MAX_SIDE,
    box_fault,
    is_absent,
    is_int,
    is_number,
    is_side,
    mask_fault,
)
from app.datasets.image_files import is_unicode, name_fault

MAX_NAME = 200  # characters; a prompt is a noun phrase

Entry = tuple[str, dict[str, Any]]  # place in the file, JSON object


class Doubled(dict[str, Any]):
    """A JSON object that has a key twice; `json.loads` would keep the last and say nothing."""

    twice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sound:
    """The entries of a COCO JSON that can be used, once their files are found."""

    images: Sequence[Entry] = ()
    annotations: Sequence[Entry] = ()
    categories: Sequence[Entry] = ()


def keep_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` that lets `check` see keys that are there twice."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    doubled, keys = Doubled(plain), [key for key, _ in pairs]
    doubled.twice = tuple(key for key in plain if keys.count(key) > 1)
    return doubled


def check(document: object, found: Findings) -> Sound:
    """Report every fault of a parsed COCO JSON, and keep what has none.

    An annotation of an image that is reported is left out without a word of its own.
    """
    if not isinstance(document, dict):
        found.add("root", "the file", document, "must be a COCO JSON object; export it again")
        return Sound()
    _check_keys("the file", document, found)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            found.add("root", f"'{key}'", document.get(key), "must be a list, as COCO has it")
    images = _check_images(document, found)
    categories = _check_categories(document, found)
    annotations = _check_annotations(document, images, found)
    return Sound(images, annotations, categories)


def listed(document: object, key: str) -> list[Any]:
    """What a document has under `images`, `annotations` or `categories`; sound or not."""
    values = document.get(key) if isinstance(document, dict) else None
    return values if isinstance(values, list) else []


def _check_keys(place: str, value: object, found: Findings) -> None:
    if isinstance(value, Doubled):
        for key in value.twice:
            remedy = "is there twice, and which of them holds is not known; delete one"
            found.add("duplicate key", f"{place}: '{key}'", value[key], remedy)


def _objects(document: dict[str, Any], key: str, found: Findings) -> Iterator[Entry]:
    for index, entry in enumerate(listed(document, key)):
        if isinstance(entry, dict):
            _check_keys(f"{key}[{index}]", entry, found)
            yield f"{key}[{index}]", entry
        else:
            found.add("entry", f"{key}[{index}]", entry, "must be a JSON object")


class _Ids:
    """The ids of one list; each must be a whole number of its own."""

    def __init__(self, kind: str, found: Findings) -> None:
        self.kind = kind
        self.found = found
        self.places: dict[int, str] = {}

    def check(self, place: str, identity: object) -> bool:
        if not is_id(identity):
            self.found.add(self.kind, f"{place}.id", identity, "must be a whole number")
        elif identity in self.places:
            remedy = f"is taken by {self.places[identity]}; renumber one"
            self.found.add(self.kind, f"{place}.id", identity, remedy)
        else:
            self.places[identity] = place
            return True
        return False


def _check_images(document: dict[str, Any], found: Findings) -> list[Entry]:
    ids, sound = _Ids("image id", found), []
    for place, image in _objects(document, "images", found):
        before = len(found.faults)
        ids.check(place, image.get("id"))
        for key in ("width", "height"):
            if not is_side(image.get(key)):
                remedy = f"must be a whole number of pixels, 1 to {MAX_SIDE}"
                found.add("image size", f"{place}.{key}", image.get(key), remedy)
        if fault := name_fault(image.get("file_name")):
            found.add("file name", f"{place}.file_name", image.get("file_name"), fault)
        if len(found.faults) == before:
            sound.append((place, image))
    return sound


def _check_categories(document: dict[str, Any], found: Findings) -> list[Entry]:
    """Those that name a class; a placeholder may share its name with one."""
    placeholders = placeholder_ids(document)
    ids, sound, seen = _Ids("category id", found), [], dict[str, str]()
    for place, category in _objects(document, "categories", found):
        identity, name = category.get("id"), category.get("name")
        unique = ids.check(place, identity)
        if unique and identity in placeholders:
            remedy = "names no class, and no annotation uses it"
            found.add("placeholder", f"{place}.name", name, remedy)
        elif _check_name(f"{place}.name", name, seen, found) and unique:
            sound.append((place, category))
    if document.get("categories") == [] and listed(document, "annotations"):
        found.add("empty", "'categories'", [], "must name the classes of the annotations")
    return sound


def _check_name(place: str, name: object, seen: dict[str, str], found: Findings) -> bool:
    if not isinstance(name, str) or not name.strip() or not is_unicode(name):
        found.add("category name", place, name, "must be the class's name, as text")
        return False
    if len(name.strip()) > MAX_NAME:
        remedy = f"has {len(name.strip())} characters: must be a name of at most {MAX_NAME}"
        found.add("category name", place, name, remedy)
        return False
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if plain in seen:
        remedy = f"is also the name of {seen[plain]}, but for case or space; merge or rename one"
        found.add("alike names", place, name, remedy)
        return False
    if name != name.strip():
        found.add("space in name", place, name, f"is read as {name.strip()!r}")
    seen[plain] = place.removesuffix(".name")
    return True


def placeholder_ids(document: dict[str, Any]) -> set[int]:
    """Ids of categories that name no class: unused, and id 0 or the supercategory of others.

    Roboflow writes one such category into its exports; it must not become a prompt.
    """
    objects = {
        key: [value for value in listed(document, key) if isinstance(value, dict)]
        for key in ("annotations", "categories")
    }
    used = {a["category_id"] for a in objects["annotations"] if is_id(a.get("category_id"))}
    categories = [c for c in objects["categories"] if is_id(c.get("id"))]
    parents: dict[str, set[int]] = {}
    for category in categories:
        if isinstance(parent := category.get("supercategory"), str):
            parents.setdefault(parent, set()).add(category["id"])
    return {
        c["id"]
        for c in categories
        if c["id"] not in used
        and len(categories) > 1
        and (c["id"] == 0 or parents.get(str(c.get("name")), set()) - {c["id"]})
    }


def _check_annotations(
    document: dict[str, Any], images: Sequence[Entry], found: Findings
) -> list[Entry]:
    sizes = {image["id"]: (image["width"], image["height"]) for _, image in images}
    known = {key: _known_ids(document, key) for key in ("images", "categories")}
    ids, sound = _Ids("annotation id", found), []
    for place, annotation in _objects(document, "annotations", found):
        ids.check(place, annotation.get("id"))
        before = len(found.faults)
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not is_id(image_id) or image_id not in known["images"]:
            remedy = "is the id of no image in 'images'"
            found.add("image reference", f"{place}.image_id", image_id, remedy)
        named = is_id(category_id) and category_id in known["categories"]
        if known["categories"] and not named:  # where there are none, that is said once
            remedy = "is the id of no category in 'categories'"
            found.add("category reference", f"{place}.category_id", category_id, remedy)
        if annotation.get("iscrowd") not in (None, 0, 1):
            found.add("iscrowd", f"{place}.iscrowd", annotation["iscrowd"], "must be 0 or 1")
        size = sizes.get(image_id) if is_id(image_id) else None
        if size is not None:
            _check_geometry(place, annotation, *size, found)
        if named and size is not None and len(found.faults) == before:
            sound.append((place, annotation))
            _note_missing(place, annotation, found)
    return sound


def _known_ids(document: dict[str, Any], key: str) -> set[int]:
    entries = (entry for entry in listed(document, key) if isinstance(entry, dict))
    return {entry["id"] for entry in entries if is_id(entry.get("id"))}


def _check_geometry(
    place: str, annotation: dict[str, Any], width: int, height: int, found: Findings
) -> None:
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if is_absent(box) and is_absent(segmentation):
        remedy = "must be given where there is no segmentation"
        found.add("no geometry", f"{place}.bbox", box, remedy)
    if not is_absent(box) and (fault := box_fault(box, width, height)):
        found.add(fault[0], f"{place}.bbox", box, fault[1])
    _check_keys(f"{place}.segmentation", segmentation, found)
    if not is_absent(segmentation) and (fault := mask_fault(segmentation, width, height)):
        found.add(fault[0], f"{place}.segmentation", segmentation, fault[1])


def _note_missing(place: str, annotation: dict[str, Any], found: Findings) -> None:
    """Report what the reader fills in."""
    if annotation.get("iscrowd") is None:
        found.add("no iscrowd", f"{place}.iscrowd", None, "is taken for 0")
    if is_absent(annotation.get("bbox")):
        found.add("no bbox", f"{place}.bbox", None, "is the box around the mask")
    if not is_area(area := annotation.get("area")):
        found.add("no area", f"{place}.area", area, "is counted from the mask, or the box")


def is_area(area: object) -> TypeGuard[float]:
    """Square pixels, 0 or more."""
    return is_number(area) and area >= 0


def is_id(value: object) -> TypeGuard[int]:
    """Whether an id fits the 64 bits that tensors hold; JSON's true and false are no ids."""
    return is_int(value) and abs(value) < 2**63
