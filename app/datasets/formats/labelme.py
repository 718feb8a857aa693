"""LabelMe: a JSON for each image, with its `shapes`, beside the images or in folders apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import by_way, image_folders
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.embedded import png_mask
from app.datasets.formats.outlines import Rle, closes, ellipse_mask, placed_mask, polygon_mask
from app.datasets.formats.parts import Box, Part, add_objects
from app.datasets.formats.telling import files, holding, leads_out, mentions
from app.datasets.names import Names

Point = tuple[float, float]
PATTERNS = ("*.json", "*/*.json", "*/*/*.json")
KEYS = ("shapes", "imagePath")
UNDERSTOOD = "polygon, rectangle, circle and mask"
# writes out the images that JSONs hold as `imageData`, beside the JSONs of a folder
WRITE_OUT = (
    'python -c "import base64,json,pathlib,sys; [p.with_name(pathlib.PureWindowsPath(d['
    "'imagePath']).name).write_bytes(base64.b64decode(d['imageData'])) for p in "
    "pathlib.Path(sys.argv[1]).rglob('*.json') for d in [json.loads(p.read_text('utf-8'))] "
    "if d.get('imageData')]\" FOLDER"
)


def is_labelme(folder: Path) -> bool:
    """Return whether one of the first JSONs, in the folder or in one of its folders, is LabelMe's.

    Other JSONs may lie beside it.
    """
    return any(
        isinstance(document, dict) and isinstance(document.get("shapes"), list)
        for pattern in PATTERNS
        for _, document in holding(folder, pattern, *KEYS)
    )


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the folders in which JSONs lie, such as train/ or labels/val/."""
    folder = folder.resolve()
    # a link that leads out is kept unread, for its fault
    paths = [
        path
        for path in files(folder, *PATTERNS)
        if leads_out(path, folder) or any(mentions(path, key) for key in KEYS)
    ]
    return {
        split: partial(_read, folder, image_folders(folder, told), found)
        for split, (told, found) in by_way(paths, folder).items()
    }


def _read(folder: Path, own: Sequence[Path], paths: Sequence[Path]) -> Reading:
    """Read these JSONs; images without one are not part of the dataset.

    Shapes of one label and one `group_id` are parts of one object. An object of rectangles alone
    has a box and no mask. `imageData` is ignored: the image file is read.

    Args:
        own: the folders of the split's images.

    Returns:
        What is sound, and every fault of every file.
    """
    draft = Draft(folder, names=Names([*own, folder], folder, own[0] if own else folder))
    for path in paths:
        document = draft.read_object(path)
        if document is not None:
            _read_document(draft, path, document)
    return draft.finish()


def _read_document(draft: Draft, path: Path, document: dict[str, Any]) -> None:
    place, name, shapes = draft.place(path), document.get("imagePath"), document.get("shapes")
    if not isinstance(name, str) or not name:
        draft.drop_file("file name", f"{place}: imagePath", name, "must name the image")
        return
    if not isinstance(shapes, list):
        draft.drop_file(
            "label file", f"{place}: shapes", shapes, "must be a list, as LabelMe has it"
        )
        return
    image = _add_image(draft, path, name, document.get("imageData"))
    if image is None:
        return
    size = (document.get("imageWidth"), document.get("imageHeight"))
    draft.check_size(image, size, f"{place}: imageWidth and imageHeight")
    add_objects(draft, image, [_part(shape, i, place, image) for i, shape in enumerate(shapes)])


def _add_image(draft: Draft, path: Path, name: str, held: object) -> Image | None:
    """Add the image that a JSON names, else the one that is called as the JSON is."""
    place, near = f"{draft.place(path)}: imagePath", path.parent
    if draft.find(name, near) is None:
        if own := draft.find(path.stem, near):
            remedy = f"is read as {own.name}, as the JSON is called"
            draft.findings.add("other name", place, name, remedy)
            return draft.add_image(own, place)
        if isinstance(held, str) and held:
            remedy = "no such file, but the JSON holds the image as imageData; all such images are "
            remedy += f"written out by: {WRITE_OUT}"
            draft.drop_file("image missing", place, name, remedy)
            return None
    return draft.add_named(name, place, near)


def _part(shape: object, index: int, place: str, image: Image) -> Part:
    entry = shape if isinstance(shape, dict) else {}
    return Part(
        label=entry.get("label"),
        group=entry.get("group_id"),
        place=f"{place}: shapes[{index}]",
        value=entry.get("points"),
        make=partial(_shape, entry, image),
    )


def _shape(entry: dict[str, Any], image: Image) -> Box | Rle:
    kind, size = entry.get("shape_type") or "polygon", (image.width, image.height)
    points = _points(entry.get("points"))
    flat = [side for point in points for side in point]
    # rotation: as X-AnyLabeling calls the corners of a turned box
    if kind in ("polygon", "rotation") or (kind == "linestrip" and closes(flat)):
        return polygon_mask(flat, *size)
    if kind == "rectangle":
        (left, top), (right, bottom) = _rectangle(points)
        return [left, top, right - left, bottom - top]
    if kind == "circle":
        if len(points) != 2:
            raise ValueError("must have its centre and one point of the circle")
        radius = math.dist(*points)
        return ellipse_mask(points[0], (radius, radius), *size)
    if kind == "mask":
        return _mask(entry.get("mask"), points, image)
    raise ValueError(f"has shape_type {kind!r}: understood are {UNDERSTOOD}")


def _mask(text: object, points: list[Point], image: Image) -> Rle:
    """Return the mask of a PNG whose first pixel is at the upper left corner, in its box."""
    (left, top), (right, bottom) = _rectangle(points)
    pixels = png_mask(text, image.width, image.height)
    rows, columns = pixels.shape
    if abs(right - left + 1 - columns) > 1 or abs(bottom - top + 1 - rows) > 1:
        raise ValueError(f"is a mask of {columns} x {rows} pixels, which its two points are not")
    return placed_mask(pixels, round(left), round(top), image.width, image.height)


def _points(points: object) -> list[Point]:
    """Return pairs of x and y in pixels; raise ValueError where they are none."""
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_finite, point))
        for point in points
    ):
        raise ValueError("must have points that are pairs of finite numbers [x, y]")
    return [(float(x), float(y)) for x, y in points]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _rectangle(points: list[Point]) -> list[Point]:
    """Return the upper left and lower right corner around two or more corners."""
    if len(points) < 2:
        raise ValueError("must have two corners; delete or redraw it")
    xs, ys = zip(*points, strict=True)
    return [(min(xs), min(ys)), (max(xs), max(ys))]
