"""Rows → our COCO layout, image by image: memory does not grow with their number."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from app.console import counted
from app.datasets.faults import Findings
from app.datasets.geometry import MAX_SIDE
from app.datasets.huggingface.hub import explained
from app.datasets.huggingface.masks import open_picture, read_bytes, upright_size
from app.datasets.huggingface.rows import Labelled, Reading, read_row
from app.errors import UserError
from app.files import write_json

log = logging.getLogger("app")

KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png"}  # written as they came
TOLERATED = 0.05  # share of images and of objects that may be faulty; more: it is misread
SPOKEN = 1000  # images between two lines of progress


def convert(
    splits: Mapping[str, Any],
    reading: Reading,
    folder: Path,
    info: dict[str, Any],
    where: str,
    group_column: str | None = None,
) -> None:
    """Write `folder/<split>/_annotations.coco.json` and `folder/<split>/images/*`.

    A published set cannot be mended by who uses it: what is faulty is left out and told, as long as
    it is little.

    Args:
        group_column: is written to the images' entries, under its own name.

    Raises:
        UserError: with the faults, where they are many; or there are no objects.
    """
    parts = [_Split(name, folder / name, reading, Findings(where), group_column) for name in splits]
    for part in parts:
        part.write(splits[part.name], where)
    _tell_faults(parts, where)
    listed, used = reading.names.listed(), {o["name"] for part in parts for o in part.objects}
    names = [*listed, *sorted(used - set(listed))]
    for part in parts:
        write_json(part.folder / "_annotations.coco.json", {"info": info, **part.document(names)})
    counts = ", ".join(
        f"{p.name} {counted(len(p.images), 'image')}, {counted(len(p.objects), 'object')}"
        for p in parts
    )
    log.info("%s: %s; classes: %s", where, counts, ", ".join(names))


class _Split:
    """One split being written: images go to their files, labels are held."""

    def __init__(
        self,
        name: str,
        folder: Path,
        reading: Reading,
        findings: Findings,
        group_column: str | None,
    ) -> None:
        self.name, self.folder, self.findings = name, folder, findings
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self._reading, self._group_column = reading, group_column
        (folder / "images").mkdir(parents=True)

    def write(self, rows: Any, where: str) -> None:
        for index, row in enumerate(_read(rows, where)):
            try:
                self._add(row, index)
            except ValueError as fault:
                place = f"{self.name} row {index}, image"
                self.findings.add("image", place, self._reading.columns.image, str(fault))
            if (index + 1) % SPOKEN == 0:
                log.info("%s: %s: %d images", where, self.name, index + 1)

    def _add(self, row: dict[str, Any], index: int) -> None:
        data = read_bytes(row[self._reading.columns.image], self._reading.roots)
        picture = open_picture(data)
        width, height = upright_size(picture)
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"must have at most {MAX_SIDE} pixels a side")
        file_name = f"images/{index:07d}{_ending(picture)}"
        _save(picture, data, self.folder / file_name)
        identity = len(self.images) + 1
        belongs = {} if (group := self._group_column) is None else {group: row[group]}
        self.images.append(
            {**belongs, "id": identity, "file_name": file_name, "width": width, "height": height}
        )

        def report(what: str, value: object, fault: str) -> None:
            self.findings.add("object", f"{self.name} row {index}, {what}", value, fault)

        for labelled in read_row(row, self._reading, width, height, report):
            self.objects.append(_entry(labelled, len(self.objects) + 1, identity))

    def document(self, names: list[str]) -> dict[str, Any]:
        """Return the COCO JSON, with these classes."""
        ids = {name: id for id, name in enumerate(names, start=1)}
        annotations = []
        for entry in self.objects:
            named = {key: value for key, value in entry.items() if key != "name"}
            annotations.append({**named, "category_id": ids[entry["name"]]})
        categories = [{"id": id, "name": name} for name, id in ids.items()]
        return {"images": self.images, "annotations": annotations, "categories": categories}


def _read(rows: Any, where: str) -> Any:
    with explained(where):
        yield from rows


def _entry(labelled: Labelled, id: int, image_id: int) -> dict[str, Any]:
    return {
        "id": id,
        "image_id": image_id,
        "name": labelled.name,
        "bbox": list(labelled.bbox_xywh),
        "area": labelled.area,
        "iscrowd": int(labelled.iscrowd),
        "segmentation": labelled.mask or [],
    }


def _ending(picture: PILImage.Image) -> str:
    """Return the ending of the file to save; more than 8 bits stay TIFF, which holds them all."""
    if picture.format == "TIFF" and picture.mode.startswith(("I", "F")):
        return ".tif"
    return KEPT.get(picture.format or "", ".png")


def _save(picture: PILImage.Image, data: bytes, path: Path) -> None:
    """Save the bytes as they came where `_ending` keeps their format, else a PNG of the pixels."""
    if path.suffix == ".tif" or picture.format in KEPT:
        path.write_bytes(data)
    else:
        picture.convert("RGB").save(path, exif=picture.getexif())


def _tell_faults(parts: list[_Split], where: str) -> None:
    lines = [line for part in parts for line in part.findings.lines()]
    kinds = [fault.kind for part in parts for fault in part.findings.faults]
    faults = {kind: kinds.count(kind) for kind in ("image", "object")}
    sound = {
        "image": sum(len(part.images) for part in parts),
        "object": sum(len(part.objects) for part in parts),
    }
    for kind, count in faults.items():
        total = count + sound[kind]
        if count > TOLERATED * total:
            raise UserError(
                [
                    f"{where}: {count} of {total} {kind}s cannot be used; are the columns read "
                    "rightly? --columns says them by hand",
                    *lines,
                ]
            )
        if count:
            log.warning("%s: %d of %d %ss are left out:", where, count, total, kind)
    for line in lines:
        log.warning("%s", line)
    if not parts[0].objects:
        raise UserError(f"{where}: no row to train on has an object; see --columns and --hf-split")
