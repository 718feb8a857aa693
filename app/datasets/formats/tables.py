"""TensorFlow's CSV of boxes: filename, width, height, class, xmin, ymin, xmax, ymax."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import image_folders, split_on_way, splits_of
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.telling import few
from app.datasets.geometry import to_number, to_side
from app.datasets.names import Names

PATTERNS = ("*.csv", "*/*.csv")
COLUMNS = ("filename", "class", "xmin", "ymin", "xmax", "ymax")


def is_table(folder: Path) -> bool:
    """Return whether a CSV's first line names these columns, in any order."""
    return any(_tables(folder))


def _tables(folder: Path) -> list[Path]:
    return [path for path in few(folder, *PATTERNS) if set(COLUMNS) <= set(_header(path))]


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [cell.strip().strip('"').lower() for cell in file.readline(1000).split(",")]
    except (OSError, UnicodeDecodeError):
        return []


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
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
    return {split: partial(_read, folder, own[split], paths) for split, paths in by_split.items()}


def _read(folder: Path, own: Sequence[Path], paths: Sequence[Path]) -> Reading:
    """Read these tables, a row an object.

    Args:
        own: the folders of the split's images.

    Returns:
        What is sound, and every fault of every row.
    """
    roots = [*own, *dict.fromkeys(path.parent for path in paths), folder]
    draft = Draft(folder, names=Names(roots, folder, own[0] if own else folder))
    images: dict[str, Image | None] = {}
    for path in paths:
        rows = csv.DictReader(io.StringIO(draft.read_text(path) or "", newline=""))
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
        place = draft.place(path)
        try:
            for row in rows:
                _add_row(draft, images, row, f"{place} line {rows.line_num}")
        except csv.Error as error:
            remedy = "must be CSV: export it again"
            draft.drop_object("label", f"{place} line {rows.line_num}", str(error), remedy)
    return draft.finish()


def _add_row(
    draft: Draft, images: dict[str, Image | None], row: dict[str, str | None], place: str
) -> None:
    name = row.get("filename") or ""
    if name not in images:
        images[name] = draft.add_named(name, place)
        if (image := images[name]) is not None:
            sides = [to_side(row.get("width")), to_side(row.get("height"))]
            draft.check_size(image, (sides[0], sides[1]), place)
    if (image := images[name]) is not None:
        left, top, right, bottom = (to_number(row.get(key)) for key in COLUMNS[2:])
        box = [left, top, right - left, bottom - top]
        draft.add_box(image, row.get("class"), box, place)
