"""CreateML: a JSON list of images, with boxes of center and size in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.telling import holding
from app.datasets.geometry import is_number
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json


def is_createml(folder: Path) -> bool:
    return _find(folder) is not None


def _find(folder: Path) -> Path | None:
    found = holding(folder, "*.json", "annotations", "coordinates", "label")
    return next((path for path, document in found if isinstance(document, list)), None)


def read(folder: Path, root: Path, _: ReadingConfig) -> Reading:
    """Read the JSON in `folder`, whose images lie beside it.

    Returns:
        What is sound, and every fault of every box.
    """
    folder = folder.resolve()
    path, draft = _find(folder), Draft(root, names=Names([folder], root.resolve()))
    try:
        document = read_json(path) if path else []
    except UserError as error:  # since it was told
        draft.findings.add_error("JSON", error)
        return draft.finish()
    for index, entry in enumerate(document):
        name = entry.get("image", entry.get("imagefilename")) if isinstance(entry, dict) else None
        image = draft.add_named(name, f"[{index}]: image")
        boxes = entry.get("annotations") if image else []
        for number, box in enumerate(boxes if isinstance(boxes, list) else [boxes]):
            place = f"[{index}]: annotations[{number}]"
            if not isinstance(box, dict):
                draft.drop_object("label", place, box, "must have a label and coordinates")
            elif image is not None:
                draft.add_box(image, box.get("label"), _box_xywh(box.get("coordinates")), place)
    return draft.finish()


def _box_xywh(coordinates: Any) -> list[Any]:
    """Return the box in pixels; what is no box of four numbers is refused later."""
    found = coordinates if isinstance(coordinates, dict) else {}
    x, y, w, h = (found.get(key) for key in ("x", "y", "width", "height"))
    if is_number(x) and is_number(y) and is_number(w) and is_number(h):
        return [x - w / 2, y - h / 2, w, h]
    return [x, y, w, h]
