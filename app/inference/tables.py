"""What a whole run leaves beside the files of each image: COCO results, a CSV, legends."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from app.files import atomic_path, write_json, write_text
from app.inference.journal import Entry
from app.inference.rle import area

COLUMNS = (
    *("file_name", "instance", "prompt", "category_id", "score", "x", "y", "width", "height"),
    *("area", "image_width", "image_height", "counts"),
)
Numbered = Iterable[tuple[int, Entry]]  # image id, what was found; read one by one


def _write_coco(path: Path, entries: Numbered, prompts: Sequence[str]) -> None:
    """COCO results, with each one's file name and prompt; image ids count from 1 in name order."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for image_id, entry in entries:
            for found in entry["found"]:
                prompt = prompts[found["category_id"] - 1]
                names = {"file_name": Path(entry["image"]).name, "prompt": prompt}
                result = {**found, "image_id": image_id, **names}
                file.write(separator + json.dumps(result, allow_nan=False))
                separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_csv(path: Path, entries: Numbered, prompts: Sequence[str]) -> None:
    """A row an object; `instance` is its number in its image, `counts` its mask as COCO's RLE."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for _, entry in entries:
            for instance, found in enumerate(entry["found"], start=1):
                mask = found.get("segmentation")
                pixels = area(mask) if mask else ""
                category = found["category_id"]
                rows.writerow(
                    [
                        *(Path(entry["image"]).name, instance, prompts[category - 1], category),
                        *(found["score"], *found["bbox"], pixels, entry["width"], entry["height"]),
                        mask["counts"] if mask else "",
                    ]
                )


def _write_legend(path: Path, _: Numbered, prompts: Sequence[str]) -> None:
    write_json(path, dict(enumerate(["background", *prompts])))


def _write_classes(path: Path, _: Numbered, prompts: Sequence[str]) -> None:
    import yaml  # here: no other table needs it

    write_text(path, yaml.safe_dump({"names": list(prompts)}, allow_unicode=True))


# by the kind of output that they belong to: path in the output folder, and what writes it
TABLES: dict[str, tuple[str, Callable[[Path, Numbered, Sequence[str]], None]]] = {
    "coco": ("predictions.json", _write_coco),
    "csv": ("predictions.csv", _write_csv),
    "semantic": ("semantic/legend.json", _write_legend),
    "yolo": ("data.yaml", _write_classes),
}
