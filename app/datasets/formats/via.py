"""VGG Image Annotator: one JSON of all images' regions, exported or saved as a project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import ellipse_mask, polygon_mask
from app.datasets.image_files import find_image, name_fault
from app.errors import UserError
from app.files import read_json

DEFAULT_CLASS = "object"  # where no region has an attribute
Region = tuple[str, dict[str, Any]]  # place, region


def is_via(folder: Path) -> bool:
    return _find(folder) is not None


def read(folder: Path, root: Path) -> Reading:
    """Read the VIA JSON in `folder`; its images lie beside it or in images/.

    Polygons, circles and ellipses are masks, rects boxes alone. An object's class is the value of
    the one region attribute.

    Returns:
        What is sound, and every fault of every region.
    """
    path, draft = _find(folder.resolve()), Draft(root)
    document = draft.read_object(path) if path else None
    if document is None:
        return draft.finish()
    entries = list(_entries(draft, _metadata(document)))
    attribute = _class_attribute(draft, [region for _, regions in entries for region in regions])
    for entry, regions in entries:
        image = _add_image(draft, entry, folder.resolve())
        for place, region in regions if image else []:
            _add_region(draft, image, place, region, attribute)
    return draft.finish()


def _find(folder: Path) -> Path | None:
    """The folder's first VIA JSON: by its usual name, else by what the first few hold."""
    usual = folder / "via_region_data.json"
    candidates = [usual] if usual.is_file() else sorted(folder.glob("*.json"))[:3]
    return next((path for path in candidates if _holds_regions(path)), None)


def _holds_regions(path: Path) -> bool:
    try:
        document = read_json(path)
    except UserError:
        return path.name == "via_region_data.json"  # so that its fault is reported
    entries = _metadata(document) if isinstance(document, dict) else {}
    return bool(entries) and all(
        isinstance(entry, dict) and "filename" in entry and "regions" in entry
        for entry in entries.values()
    )


def _metadata(document: dict[str, Any]) -> dict[str, Any]:
    """The images' entries: a project has them under a key of their own."""
    entries = document.get("_via_img_metadata", document)
    return entries if isinstance(entries, dict) else {}


def _entries(
    draft: Draft, metadata: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], list[Region]]]:
    """Each image's entry and its regions, which VIA 1 has in a dict and VIA 2 in a list."""
    for key, entry in metadata.items():
        regions = entry.get("regions") if isinstance(entry, dict) else None
        listed = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(listed, list):
            draft.found.add("entry", f"'{key}'", entry, "must have a filename and regions")
            continue
        sound = []
        for index, region in enumerate(listed):
            place = f"{entry.get('filename')}: regions[{index}]"
            if isinstance(region, dict) and isinstance(region.get("shape_attributes"), dict):
                sound.append((place, region))
            else:
                draft.found.add("region", place, region, "must have shape_attributes")
        yield entry, sound


def _attributes(region: dict[str, Any]) -> dict[str, Any]:
    attributes = region.get("region_attributes")
    return attributes if isinstance(attributes, dict) else {}


def _class_attribute(draft: Draft, regions: list[Region]) -> str | None:
    """The name of the only region attribute; None where there is none."""
    names = sorted({name for _, region in regions for name in _attributes(region)})
    if len(names) > 1:
        remedy = "must be one attribute, that says the class; delete the others in VIA"
        draft.found.add("attribute", "region_attributes", ", ".join(names), remedy)
    return names[0] if names else None


def _add_image(draft: Draft, entry: dict[str, Any], folder: Path) -> Image | None:
    name = entry.get("filename")
    if fault := name_fault(name):
        draft.found.add("image", "filename", name, fault)
        return None
    path = find_image(str(name), [folder])
    if path is None:
        draft.found.add("image", "filename", name, f"no such file in {folder} or its images/")
        return None
    return draft.add_image(path, str(name))


def _add_region(
    draft: Draft, image: Image | None, place: str, region: dict[str, Any], attribute: str | None
) -> None:
    assert image is not None
    shape = region["shape_attributes"]
    name = DEFAULT_CLASS if attribute is None else _class(_attributes(region).get(attribute))
    if name is None:
        value = _attributes(region).get(attribute or "")
        draft.found.add("class", f"{place}.{attribute}", value, "must be one class's name")
    elif shape.get("name") == "rect":
        box = [shape.get(key) for key in ("x", "y", "width", "height")]
        draft.add_box(image, name, box, place)
    else:
        try:
            draft.add_mask(image, name, _mask(shape, image.width, image.height), place)
        except ValueError as fault:
            draft.found.add("shape", place, shape, str(fault))


def _class(value: object) -> str | None:
    """A text, or the only one ticked of several boxes."""
    if isinstance(value, dict):
        ticked = [name for name, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else None
    return value.strip() if isinstance(value, str) and value.strip() else None


def _mask(shape: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    kind, center = shape.get("name"), (shape.get("cx"), shape.get("cy"))
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise ValueError("must have as many all_points_x as all_points_y")
        points = zip(xs, ys, strict=True)
        return polygon_mask([side for point in points for side in point], width, height)
    if kind == "circle":
        return ellipse_mask(center, (shape.get("r"), shape.get("r")), width, height)
    if kind == "ellipse":
        radii = (shape.get("rx"), shape.get("ry"))
        return ellipse_mask(center, radii, width, height, shape.get("theta", 0.0))
    raise ValueError(f"is a {kind!r}: understood are polygon, rect, circle and ellipse")
