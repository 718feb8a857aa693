"""Every fault of a COCO JSON, found before anything trusts it."""

from __future__ import annotations

import unicodedata
from collections import Counter
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
LISTS = ("images", "annotations", "categories")
UNKNOWN = (
    "no labels' file that is known: COCO's JSON has images, annotations and categories; read are "
    "also the JSONs of Label Studio, LabelMe, Supervisely, Datumaro, VGG Image Annotator, CreateML "
    "and Cityscapes (docs/data.md): export one of these"
)

Entry = tuple[str, dict[str, Any]]  # place in the file, JSON object


class Doubled(dict[str, Any]):
    """A JSON object that has a key twice, of which `json.loads` would silently keep the last."""

    twice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sound:
    """The entries of a COCO JSON that can be used, once their files are found."""

    images: Sequence[Entry] = ()
    annotations: Sequence[Entry] = ()
    categories: Sequence[Entry] = ()


def keep_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object from its pairs, as `object_pairs_hook`, so that `check` sees repeated keys."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    doubled, counts = Doubled(plain), Counter(key for key, _ in pairs)
    doubled.twice = tuple(key for key in plain if counts[key] > 1)
    return doubled


def check(document: object, findings: Findings) -> Sound:
    """Report every fault of a parsed COCO JSON, and keep what has none.

    An annotation of an image that is reported is left out without a word of its own.
    """
    if not isinstance(document, dict) or not any(key in document for key in LISTS):
        held = list(document) if isinstance(document, dict) else document
        findings.add("root", "its top level", held, UNKNOWN)
        return Sound()
    _check_keys("the file", document, findings)
    for key in LISTS:
        if not isinstance(document.get(key), list):
            findings.add("root", f"'{key}'", document.get(key), "must be a list, as COCO has it")
    images = _check_images(document, findings)
    categories = _check_categories(document, findings)
    annotations = _check_annotations(document, images, findings)
    return Sound(images, annotations, categories)


def listed(document: object, key: str) -> list[Any]:
    """Return the document's `images`, `annotations` or `categories`, sound or not."""
    values = document.get(key) if isinstance(document, dict) else None
    return values if isinstance(values, list) else []


def _check_keys(place: str, value: object, findings: Findings) -> None:
    if isinstance(value, Doubled):
        for key in value.twice:
            remedy = "is there twice, and which of them holds is not known; delete one"
            findings.add("duplicate key", f"{place}: '{key}'", value[key], remedy)


def _objects(document: dict[str, Any], key: str, findings: Findings) -> Iterator[Entry]:
    for index, entry in enumerate(listed(document, key)):
        if isinstance(entry, dict):
            _check_keys(f"{key}[{index}]", entry, findings)
            yield f"{key}[{index}]", entry
        else:
            findings.add("entry", f"{key}[{index}]", entry, "must be a JSON object")


class _Ids:
    """The ids of one list, each of which must be a whole number of its own."""

    def __init__(self, kind: str, findings: Findings) -> None:
        self.kind = kind
        self.findings = findings
        self.places: dict[int, str] = {}

    def check(self, place: str, identity: object) -> bool:
        if not is_id(identity):
            self.findings.add(self.kind, f"{place}.id", identity, "must be a whole number")
        elif identity in self.places:
            remedy = f"is taken by {self.places[identity]}; renumber one"
            self.findings.add(self.kind, f"{place}.id", identity, remedy)
        else:
            self.places[identity] = place
            return True
        return False


def _check_images(document: dict[str, Any], findings: Findings) -> list[Entry]:
    ids, sound = _Ids("image id", findings), []
    for place, image in _objects(document, "images", findings):
        before = len(findings.faults)
        ids.check(place, image.get("id"))
        for key in ("width", "height"):
            if not is_side(image.get(key)):
                remedy = f"must be a whole number of pixels, 1 to {MAX_SIDE}"
                findings.add("image size", f"{place}.{key}", image.get(key), remedy)
        if fault := name_fault(image.get("file_name")):
            findings.add("file name", f"{place}.file_name", image.get("file_name"), fault)
        if len(findings.faults) == before:
            sound.append((place, image))
    return sound


def _check_categories(document: dict[str, Any], findings: Findings) -> list[Entry]:
    """Return the entries that name a class; a placeholder may share its name with one."""
    placeholders = placeholder_ids(document)
    ids, sound, places = _Ids("category id", findings), [], dict[str, str]()
    for place, category in _objects(document, "categories", findings):
        identity, name = category.get("id"), category.get("name")
        unique = ids.check(place, identity)
        if unique and identity in placeholders:
            remedy = "names no class, and no annotation uses it"
            findings.add("placeholder", f"{place}.name", name, remedy)
        elif _check_name(f"{place}.name", name, places, findings) and unique:
            sound.append((place, category))
    if document.get("categories") == [] and listed(document, "annotations"):
        findings.add("empty", "'categories'", [], "must name the classes of the annotations")
    return sound


def _check_name(place: str, name: object, places: dict[str, str], findings: Findings) -> bool:
    if not isinstance(name, str) or not name.strip() or not is_unicode(name):
        findings.add("category name", place, name, "must be the class's name, as text")
        return False
    if len(name.strip()) > MAX_NAME:
        remedy = f"has {len(name.strip())} characters: must be a name of at most {MAX_NAME}"
        findings.add("category name", place, name, remedy)
        return False
    plain = as_read(name)
    if plain in places:
        remedy = f"is also the name of {places[plain]}, but for case or space; merge or rename one"
        findings.add("alike names", place, name, remedy)
        return False
    if name != name.strip():
        findings.add("space in name", place, name, f"is read as {name.strip()!r}")
    places[plain] = place.removesuffix(".name")
    return True


def as_read(name: str) -> str:
    """Return a class's name as the model reads it: case and space make no difference."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def placeholder_ids(document: dict[str, Any]) -> set[int]:
    """Return ids of categories that name no class: unused, and id 0 or others' supercategory.

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
    document: dict[str, Any], images: Sequence[Entry], findings: Findings
) -> list[Entry]:
    sizes = {image["id"]: (image["width"], image["height"]) for _, image in images}
    listed_ids = {key: _known_ids(document, key) for key in ("images", "categories")}
    ids, sound = _Ids("annotation id", findings), []
    for place, annotation in _objects(document, "annotations", findings):
        ids.check(place, annotation.get("id"))
        before = len(findings.faults)
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not is_id(image_id) or image_id not in listed_ids["images"]:
            remedy = "is the id of no image in 'images'"
            findings.add("image reference", f"{place}.image_id", image_id, remedy)
        named = is_id(category_id) and category_id in listed_ids["categories"]
        if listed_ids["categories"] and not named:  # where there are none, that is said once
            remedy = "is the id of no category in 'categories'"
            findings.add("category reference", f"{place}.category_id", category_id, remedy)
        if annotation.get("iscrowd") not in (None, 0, 1):
            findings.add("iscrowd", f"{place}.iscrowd", annotation["iscrowd"], "must be 0 or 1")
        size = sizes.get(image_id) if is_id(image_id) else None
        if size is not None:
            _check_geometry(place, annotation, *size, findings)
        if named and size is not None and len(findings.faults) == before:
            sound.append((place, annotation))
            _note_missing(place, annotation, findings)
    return sound


def _known_ids(document: dict[str, Any], key: str) -> set[int]:
    entries = (entry for entry in listed(document, key) if isinstance(entry, dict))
    return {entry["id"] for entry in entries if is_id(entry.get("id"))}


def _check_geometry(
    place: str, annotation: dict[str, Any], width: int, height: int, findings: Findings
) -> None:
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if is_absent(box) and is_absent(segmentation):
        remedy = "must be given where there is no segmentation"
        findings.add("no geometry", f"{place}.bbox", box, remedy)
    if not is_absent(box) and (fault := box_fault(box, width, height)):
        findings.add(fault[0], f"{place}.bbox", box, fault[1])
    _check_keys(f"{place}.segmentation", segmentation, findings)
    if not is_absent(segmentation) and (fault := mask_fault(segmentation, width, height)):
        findings.add(fault[0], f"{place}.segmentation", segmentation, fault[1])


def _note_missing(place: str, annotation: dict[str, Any], findings: Findings) -> None:
    """Report what the reader fills in."""
    if annotation.get("iscrowd") is None:
        findings.add("no iscrowd", f"{place}.iscrowd", None, "is taken for 0")
    if is_absent(annotation.get("bbox")):
        findings.add("no bbox", f"{place}.bbox", None, "is the box around the mask")
    if not is_area(area := annotation.get("area")):
        findings.add("no area", f"{place}.area", area, "is counted from the mask, or the box")


def is_area(area: object) -> TypeGuard[float]:
    """Return whether it is a number of square pixels, 0 or more."""
    return is_number(area) and area >= 0


def is_id(value: object) -> TypeGuard[int]:
    """Return whether an id fits the 64 bits that tensors hold; JSON's true and false are no ids."""
    return is_int(value) and abs(value) < 2**63
