"""Files of a whole run, beside those of each image: COCO results, a CSV, legends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app.datasets.rle import area
from app.files import atomic_path, csv_text, write_csv, write_json, write_text
from app.inference.journal import Entry

COLUMNS = (
    *("file_name", "instance", "prompt", "category_id", "score", "x", "y", "width", "height"),
    *("area", "image_width", "image_height", "counts"),
)
Numbered = Iterable[tuple[int, Entry]]  # image id and entry, read one by one


def _write_coco(path: Path, entries: Numbered, prompts: Sequence[str]) -> None:
    """Write COCO results with file name and prompt; image ids count from 1 in name order."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for image_id, entry in entries:
            for result in entry["found"]:
                prompt = prompts[result["category_id"] - 1]
                names = {"file_name": Path(entry["image"]).name, "prompt": prompt}
                line = {**result, "image_id": image_id, **names}
                file.write(separator + json.dumps(line, allow_nan=False))
                separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_csv(path: Path, entries: Numbered, prompts: Sequence[str]) -> None:
    """Write a row an object; `instance` is its number in its image, `counts` its mask's RLE."""
    write_csv(path, COLUMNS, (row for _, entry in entries for row in _rows(entry, prompts)))


def _rows(entry: Entry, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of `COLUMNS` of each object of an image."""
    name, width, height = csv_text(Path(entry["image"]).name), entry["width"], entry["height"]
    for instance, result in enumerate(entry["found"], start=1):
        mask, category = result.get("segmentation"), result["category_id"]
        values = (
            *(name, instance, csv_text(prompts[category - 1]), category, result["score"]),
            *result["bbox"],
            *(area(mask) if mask else "", width, height, mask["counts"] if mask else ""),
        )
        yield dict(zip(COLUMNS, values, strict=True))


def _write_legend(path: Path, _: Numbered, prompts: Sequence[str]) -> None:
    write_json(path, dict(enumerate(["background", *prompts])))


def _write_classes(path: Path, _: Numbered, prompts: Sequence[str]) -> None:
    import yaml  # here: no other table needs it

    write_text(path, yaml.safe_dump({"names": list(prompts)}, allow_unicode=True))


# Kind of output → path in the output folder, and the function that writes it.
TABLES: dict[str, tuple[str, Callable[[Path, Numbered, Sequence[str]], None]]] = {
    "coco": ("predictions.json", _write_coco),
    "csv": ("predictions.csv", _write_csv),
    "semantic": ("semantic/legend.json", _write_legend),
    "yolo": ("data.yaml", _write_classes),
}
