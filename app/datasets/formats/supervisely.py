"""Supervisely: a JSON an image in `ann/`, its image in `img/`, in one dataset or in several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import WORDS, split_of, split_on_way, splits_of
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.embedded import png_mask
from app.datasets.formats.outlines import Rle, closes, placed_mask, polygon_mask, without
from app.datasets.formats.parts import Box, Part, add_objects
from app.datasets.formats.telling import entries, files, holding, leads_out
from app.datasets.geometry import is_number
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

PATTERNS = ("ann/*.json", "*/ann/*.json", "*/*/ann/*.json")
UNDERSTOOD = "rectangle, polygon and bitmap"


def is_supervisely(folder: Path) -> bool:
    """Return whether JSONs with objects lie in a folder ann/."""
    return any(
        isinstance(document, dict) and isinstance(document.get("objects"), list)
        for pattern in PATTERNS
        for _, document in holding(folder, pattern, "objects", "size")
    )


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the datasets' names, else by tags of the images: train, val, test.

    Raises:
        UserError: some datasets are called as splits are, and others not.
    """
    folder = folder.resolve()
    paths = list(files(folder, *PATTERNS))
    datasets = {path: split_on_way(path, folder) or path.parent.parent.name for path in paths}
    by_split: dict[str, list[Path]] = {}
    if any(map(split_of, datasets.values())):
        told = splits_of(datasets.values(), f"{folder}: the datasets")
        for path, name in datasets.items():
            by_split.setdefault(told[name], []).append(path)
        return {split: partial(_read, folder, paths) for split, paths in by_split.items()}
    for path in paths:
        tagged = "" if leads_out(path, folder) else _tagged(path)
        by_split.setdefault(tagged, []).append(path)
    rest = by_split.pop("", [])
    if not by_split:
        return {"train": partial(_read, folder, rest)}
    first = next(iter(by_split))
    found = {split: partial(_read, folder, paths) for split, paths in by_split.items()}
    return {**found, first: partial(_read, folder, by_split[first], rest)}


def _tagged(path: Path) -> str:
    """Return the split that an image's tags tell; empty where they tell none."""
    try:
        document = read_json(path)
    except UserError:
        return ""
    tags = entries(document.get("tags")) if isinstance(document, dict) else []
    told = (WORDS.get(str(tag.get("name")).lower()) for tag in tags)
    return next((split for split in told if split), "")


def _read(folder: Path, paths: Sequence[Path], untagged: Sequence[Path] = ()) -> Reading:
    """Read these JSONs, each with the image in img/ beside its ann/ whose name it has.

    Args:
        untagged: JSONs of images without a split's tag, while others have one.

    Returns:
        What is sound, and every fault of every object.
    """
    draft = Draft(folder, names=Names([folder], folder))
    kinds = _class_shapes(draft)
    for path in paths:
        document = draft.read_object(path)
        if document is None:
            continue
        image = draft.add_named(path.stem, draft.place(path), path.parent.parent / "img")
        if image is None:
            continue
        size = document.get("size")
        sides = size if isinstance(size, dict) else {}
        place = draft.place(path)
        draft.check_size(image, (sides.get("width"), sides.get("height")), f"{place}: size")
        objects = document.get("objects")
        if not isinstance(objects, list):
            draft.drop_image(image, "label file", f"{place}: objects", objects, "must be a list")
            continue
        parts = [_part(one, i, place, image, kinds) for i, one in enumerate(objects)]
        add_objects(draft, image, parts)
    if untagged:
        for path in untagged:
            draft.pass_over(path.stem, path.parent.parent / "img")
        remedy = f"{len(untagged)} images have no tag train or val, such as {untagged[0].stem}"
        draft.findings.add("unlisted", "tags", f"{len(untagged)} images", f"{remedy}: not used")
    return draft.finish()


def _class_shapes(draft: Draft) -> dict[str, object]:
    """Return the shape of each class, as the project's list says; older objects do not."""
    for name in ("meta.json", "classes.json"):  # the latter is older, and a list
        path = draft.root / name
        if not path.is_file() or leads_out(path, draft.root):
            continue
        try:
            document = read_json(path)
        except UserError:
            continue
        listed = document.get("classes") if isinstance(document, dict) else document
        return {str(entry.get("title")): entry.get("shape") for entry in entries(listed)}
    return {}


def _part(entry: object, index: int, place: str, image: Image, kinds: dict[str, object]) -> Part:
    found = entry if isinstance(entry, dict) else {}
    kind = found.get("geometryType") or kinds.get(str(found.get("classTitle")))
    found = {**found, "geometryType": "bitmap" if isinstance(found.get("bitmap"), dict) else kind}
    # smart-tool masks of one object have one `instance`
    return Part(
        label=found.get("classTitle"),
        group=found.get("instance"),
        place=f"{place}: objects[{index}]",
        value=found.get("points") or found.get("geometryType"),
        make=partial(_shape, found, image),
    )


def _shape(entry: dict[str, Any], image: Image) -> Box | Rle:
    kind, size = entry.get("geometryType"), (image.width, image.height)
    points = entry.get("points")
    exterior, holes = (
        (points.get("exterior"), points.get("interior")) if isinstance(points, dict) else ([], [])
    )
    if kind == "rectangle":
        corners = _points(exterior)
        if len(corners) != 2:
            raise ValueError("must have two corners")
        (left, right), (top, bottom) = (sorted(sides) for sides in zip(*corners, strict=True))
        return [left, top, right - left + 1, bottom - top + 1]  # the last pixel is inside
    if kind == "polygon" or (kind == "line" and closes(_flat(exterior))):
        mask = polygon_mask(_flat(exterior), *size)
        cut = holes if isinstance(holes, list) else []
        return without(mask, [polygon_mask(_flat(hole), *size) for hole in cut]) if cut else mask
    if kind == "bitmap":
        bitmap = entry.get("bitmap")
        found = bitmap if isinstance(bitmap, dict) else {}
        ((left, top),) = _points([found.get("origin")])
        pixels = png_mask(found.get("data"), *size, zipped=True)
        return placed_mask(pixels, round(left), round(top), *size)
    raise ValueError(f"is a {kind}: understood are {UNDERSTOOD}")


def _points(points: object) -> list[tuple[float, float]]:
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point))
        for point in points
    ):
        raise ValueError("must have points that are pairs of finite numbers [x, y]")
    return [(float(x), float(y)) for x, y in points]


def _flat(points: object) -> list[float]:
    return [side for point in _points(points) for side in point]
