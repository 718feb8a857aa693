"""CSV of boxes: TensorFlow's columns, in any order and under their usual names, or RetinaNet's.

TensorFlow's are filename, width, height, class, xmin, ymin, xmax, ymax; VoTT and DeepForest call
them image or image_path, and label. RetinaNet's have no heading: path, x1, y1, x2, y2, class.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.conventions import TO_XYWH
from app.datasets.folders import image_folders, split_on_way, splits_of
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.telling import few
from app.datasets.geometry import is_number, to_number, to_side
from app.datasets.names import Names

PATTERNS = ("*.csv", "*/*.csv")
COLUMNS = ("filename", "class", "xmin", "ymin", "xmax", "ymax")
ALSO = {
    **dict.fromkeys(("image", "image_path", "image_name", "file_name"), "filename"),
    **dict.fromkeys(("label", "class_name", "category"), "class"),
}
RETINANET = ["filename", "xmin", "ymin", "xmax", "ymax", "class"]
# a line without a heading; of an image without objects all but its path is empty
PLAIN = re.compile(r"[^\n,]+\.(jpe?g|png|bmp|tiff?)((, ?-?\d+(\.\d+)?){4},[^\n,]+|,{5})\s*", re.I)
LONGEST = 1000  # characters of a heading
SLACK = 0.01  # that rounding may leave 0..1 by
Row = tuple[str, dict[str, str | None]]  # place, cells by column


def is_table(folder: Path) -> bool:
    """Return whether a CSV's first line names these columns, or is of RetinaNet's."""
    return any(_tables(folder))


def _tables(folder: Path) -> list[Path]:
    return [path for path in few(folder, *PATTERNS) if _columns(_first_line(path))]


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline(LONGEST)
    except (OSError, UnicodeDecodeError):
        return ""


def _columns(line: str) -> list[str] | None:
    """Return the columns that a first line tells; None where it is of another table."""
    if PLAIN.fullmatch(line):
        return RETINANET
    cells = [cell.strip().strip('"').lower() for cell in line.split(",")]
    # one that is called as TensorFlow calls it counts before any that means the same
    names = [cell if ALSO.get(cell) in cells else ALSO.get(cell, cell) for cell in cells]
    return names if set(COLUMNS) <= set(names) else None


def splits(folder: Path, reading: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the folders of the tables, else by their names.

    Raises:
        UserError: some names tell a split and others do not.
    """
    folder = folder.resolve()
    named = {path: split_on_way(path, folder) or path.stem for path in _tables(folder)}
    told = splits_of(named.values(), f"{folder}: the tables")
    by_split: dict[str, list[Path]] = {}
    for path, name in named.items():
        by_split.setdefault(told[name], []).append(path)
    own = {split: image_folders(folder, split) if len(by_split) > 1 else [] for split in by_split}
    column = None if reading.group_column is None else reading.group_column.lower()
    return {
        split: partial(_read, folder, own[split], paths, column)
        for split, paths in by_split.items()
    }


def _read(folder: Path, own: Sequence[Path], paths: Sequence[Path], column: str | None) -> Reading:
    """Read these tables, a row an object.

    Corners that all lie in 0..1, as TensorFlow has them in its records, are shares of the image.

    Args:
        own: the folders of the split's images.
        column: in lower case, that says what an image belongs with; None where none is named.

    Returns:
        What is sound, and every fault of every row.
    """
    roots = [*own, *dict.fromkeys(path.parent for path in paths), folder]
    draft = Draft(folder, names=Names(roots, folder, own[0] if own else folder))
    images: dict[str, Image | None] = {}
    rows = [row for path in paths for row in _rows(draft, path)]
    corners = [number for _, row in rows for number in _corners(row) if is_number(number)]
    shares = bool(corners) and min(corners) >= 0 and max(corners) <= 1 + SLACK
    for place, row in rows:
        _add_row(draft, images, row, place, shares=shares)
        if (image := images[row.get("filename") or ""]) is not None:
            draft.put_in_group(image, row, column)
    notes = ("boxes are shares of their images, 0 to 1, and read as such",) if shares else ()
    return replace(draft.finish(), notes=notes)


def _rows(draft: Draft, path: Path) -> Iterator[Row]:
    text, place = draft.read_text(path) or "", draft.place(path)
    names = _columns(text[:LONGEST].partition("\n")[0]) or []
    rows = csv.DictReader(io.StringIO(text, newline=""), names)
    try:
        if names is not RETINANET:
            next(rows, None)
        for row in rows:
            yield f"{place} line {rows.line_num}", row
    except csv.Error as error:
        remedy = "must be CSV: export it again"
        draft.drop_object("label", f"{place} line {rows.line_num}", str(error), remedy)


def _corners(row: dict[str, str | None]) -> list[float]:
    """Return left, top, right, bottom; nothing of an image without objects."""
    empty = all(row.get(key) == "" for key in COLUMNS[1:])
    return [] if empty else [to_number(row.get(key)) for key in COLUMNS[2:]]


def _add_row(
    draft: Draft,
    images: dict[str, Image | None],
    row: dict[str, str | None],
    place: str,
    *,
    shares: bool,
) -> None:
    name = row.get("filename") or ""
    if name not in images:
        images[name] = draft.add_named(name, place)
        if (image := images[name]) is not None:
            sides = [to_side(row.get("width")), to_side(row.get("height"))]
            draft.check_size(image, (sides[0], sides[1]), place)
    if (image := images[name]) is not None and (corners := _corners(row)):
        left, top, right, bottom = corners
        box = [left, top, right - left, bottom - top]
        if shares:
            box = TO_XYWH["shares"](box, (image.width, image.height))
        draft.add_box(image, row.get("class"), box, place)
