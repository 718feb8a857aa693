"""VGG Image Annotator: one JSON or CSV of all images' regions, or a saved project's JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import closes, ellipse_mask, polygon_mask
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

DEFAULT_CLASS = "object"  # where no region has an attribute
# VIA 1 puts a # before it
CSV_HEADER = (
    *("filename", "file_size", "file_attributes", "region_count", "region_id"),
    *("region_shape_attributes", "region_attributes"),
)
Region = tuple[str, dict[str, Any]]  # place, region


def is_via(folder: Path) -> bool:
    return _find(folder) is not None


def read(folder: Path, root: Path, reading: ReadingConfig) -> Reading:
    """Read the VIA JSON or CSV in `folder`; its images lie beside it or in images/.

    Polygons, circles and ellipses are masks, rects boxes alone. An object's class is the value of
    the one region attribute.

    Returns:
        What is sound, and every fault of every region.
    """
    folder = folder.resolve()
    path, draft = _find(folder), Draft(root, names=Names([folder], root.resolve()))
    if path is None:
        metadata: dict[str, Any] = {}
    elif path.suffix == ".csv":
        metadata = _read_csv(draft, path)
    else:
        metadata = _metadata(draft.read_object(path, "JSON") or {})
    entries = list(_entries(draft, metadata))
    every = [region for _, regions in entries for region in regions]
    attribute = _class_attribute(draft, every, reading.attribute)
    for entry, regions in entries:
        image = draft.add_named(entry.get("filename"), "filename")
        for place, region in regions if image else []:
            _add_region(draft, image, place, region, attribute)
    return draft.finish()


def _find(folder: Path) -> Path | None:
    """Find the folder's first VIA file: by its usual name, else by the content of the first few."""
    usual = folder / "via_region_data.json"
    candidates = [usual] if usual.is_file() else sorted(folder.glob("*.json"))[:3]
    tables = (path for path in sorted(folder.glob("*.csv"))[:3] if _has_header(path))
    return next((path for path in candidates if _holds_regions(path)), next(tables, None))


def _has_header(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline().strip().lstrip("#") == ",".join(CSV_HEADER)
    except (OSError, UnicodeDecodeError):
        return False


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
    """Return the images' entries, which a project has under a key of their own."""
    entries = document.get("_via_img_metadata", document)
    return entries if isinstance(entries, dict) else {}


def _read_csv(draft: Draft, path: Path) -> dict[str, Any]:
    """Return the images' entries, as in the JSON, from a table with a row for each region.

    An image without regions has one row, with empty attributes.
    """
    metadata: dict[str, Any] = {}
    rows = csv.reader(io.StringIO(draft.read_text(path) or "", newline=""))
    try:
        for row in rows:
            if rows.line_num > 1 and row:
                _add_row(draft, metadata, row, f"{draft.place(path)} line {rows.line_num}")
    except csv.Error as error:
        remedy = "must be CSV as VIA writes it; export JSON instead"
        draft.drop_object("label", f"{draft.place(path)} line {rows.line_num}", str(error), remedy)
    return metadata


def _add_row(draft: Draft, metadata: dict[str, Any], row: list[str], place: str) -> None:
    if len(row) != len(CSV_HEADER):
        draft.drop_object(
            "label", place, row, f"must have the {len(CSV_HEADER)} columns of its header"
        )
        return
    name, *_, shape, attributes = row
    regions = metadata.setdefault(name, {"filename": name, "regions": []})["regions"]
    try:
        region = {
            "shape_attributes": json.loads(shape),
            "region_attributes": json.loads(attributes),
        }
    except (ValueError, RecursionError):
        remedy = "must be JSON in the last two columns; export it again"
        draft.drop_object("label", place, [shape, attributes], remedy)
        return
    if region["shape_attributes"]:
        regions.append(region)


def _entries(
    draft: Draft, metadata: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], list[Region]]]:
    """Return each image's entry and its regions, a dict in VIA 1 and a list in VIA 2."""
    for key, entry in metadata.items():
        regions = entry.get("regions") if isinstance(entry, dict) else None
        listed = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(listed, list):
            draft.drop_file("entry", f"'{key}'", entry, "must have a filename and regions")
            continue
        sound = []
        for index, region in enumerate(listed):
            place = f"{entry.get('filename')}: regions[{index}]"
            if isinstance(region, dict) and isinstance(region.get("shape_attributes"), dict):
                sound.append((place, region))
            else:
                draft.drop_object("shape", place, region, "must have shape_attributes")
        yield entry, sound


def _attributes(region: dict[str, Any]) -> dict[str, Any]:
    attributes = region.get("region_attributes")
    return attributes if isinstance(attributes, dict) else {}


def _class_attribute(draft: Draft, regions: list[Region], chosen: str | None) -> str | None:
    """Return the name of the region attribute that says the class; None where there is none."""
    names = sorted({name for _, region in regions for name in _attributes(region)})
    listed = ", ".join(names)
    if chosen is not None and chosen not in names:
        remedy = f"is no region attribute of this file; there is {listed or 'none'}"
        draft.findings.add("attribute", "--attribute", chosen, remedy)
    elif chosen is None and len(names) > 1:
        remedy = (
            f"must be one attribute, that says the class: --attribute {names[0]} takes that one"
        )
        draft.findings.add("attribute", "region_attributes", listed, remedy)
    return chosen or (names[0] if names else None)


def _add_region(
    draft: Draft, image: Image | None, place: str, region: dict[str, Any], attribute: str | None
) -> None:
    assert image is not None
    shape = region["shape_attributes"]
    name = DEFAULT_CLASS if attribute is None else _class(_attributes(region).get(attribute))
    if name is None:
        value = _attributes(region).get(attribute or "")
        draft.drop_object("label", f"{place}.{attribute}", value, "must be one class's name")
    elif shape.get("name") == "rect":
        box = [shape.get(key) for key in ("x", "y", "width", "height")]
        draft.add_box(image, name, box, place)
    else:
        try:
            draft.add_mask(image, name, _mask(shape, image.width, image.height), place)
        except ValueError as fault:
            draft.drop_object("shape", place, shape, str(fault))


def _class(value: object) -> str | None:
    """Return a class given as text, or as the only box of several that is ticked."""
    if isinstance(value, dict):
        ticked = [name for name, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else None
    return value.strip() if isinstance(value, str) and value.strip() else None


def _mask(shape: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    kind, center = shape.get("name"), (shape.get("cx"), shape.get("cy"))
    if kind in ("polygon", "polyline"):
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise ValueError("must have as many all_points_x as all_points_y")
        flat = [side for point in zip(xs, ys, strict=True) for side in point]
        if kind == "polygon" or closes(flat):
            return polygon_mask(flat, width, height)
    if kind == "circle":
        return ellipse_mask(center, (shape.get("r"), shape.get("r")), width, height)
    if kind == "ellipse":
        radii = (shape.get("rx"), shape.get("ry"))
        return ellipse_mask(center, radii, width, height, shape.get("theta", 0.0))
    raise ValueError(f"is a {kind!r}: understood are polygon, rect, circle and ellipse")
