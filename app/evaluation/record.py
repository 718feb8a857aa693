"""Write the results of an evaluation into its folder, and read them again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.datasets import coco
from app.datasets.coco import Annotation, Category, Dataset, Image
from app.errors import UserError
from app.evaluation.metrics import by_class
from app.files import csv_text, read_json, write_csv, write_json

FOLDER = "predictions"
BY_CLASS = "metrics_by_class.csv"
_TRUTH = "_truth.json"


@dataclass(frozen=True)
class Record:
    """Hold the results of a split, and the truth that they were scored against."""

    split: str
    truth: Dataset
    results: list[dict[str, Any]]


def write(folder: Path, record: Record) -> None:
    """Write `predictions/<split>.json`, `predictions/<split>_truth.json`, `metrics_by_class.csv`.

    They replace an earlier record, of whatever split.
    """
    results, truth = written = _files(folder, record.split)
    write_json(results, record.results)
    coco.write(record.truth, truth)
    for earlier in {file for split in _splits(folder) for file in _files(folder, split)}:
        if earlier not in written:
            earlier.unlink()
    rows = [
        {**row, "class": csv_text(str(row["class"]))}
        for row in by_class(record.truth, record.results)
    ]
    write_csv(folder / BY_CLASS, list(dict.fromkeys(key for row in rows for key in row)), rows)


def read(folder: Path) -> Record:
    """Read the record of a run or an evaluation.

    Raises:
        UserError: the folder holds none.
    """
    splits = _splits(folder)
    if not splits:
        raise UserError(
            f"{folder}: holds no evaluation (predictions/*{_TRUTH}). Name the --output-dir of a "
            "finished training, or of python -m app evaluate"
        )
    results, truth = _files(folder, splits[0])
    try:
        return Record(splits[0], _dataset(read_json(truth)), read_json(results))
    except (KeyError, TypeError) as error:
        raise UserError(f"{truth}: is not as it was written ({error!r})") from None


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the paths of results and truth."""
    return folder / FOLDER / f"{split}.json", folder / FOLDER / f"{split}{_TRUTH}"


def _splits(folder: Path) -> list[str]:
    """Return the splits with results and truth: one, or more where a writer was killed."""
    truths = sorted((folder / FOLDER).glob(f"*{_TRUTH}"))
    splits = [file.name.removesuffix(_TRUTH) for file in truths]
    return [split for split in splits if _files(folder, split)[0].is_file()]


def _dataset(document: dict[str, Any]) -> Dataset:
    """Read what `coco.write` wrote, without looking for the images."""
    return Dataset(
        tuple(
            Image(
                entry["id"],
                Path(entry["file_name"]),
                entry["width"],
                entry["height"],
                tuple(entry["levels"]) if "levels" in entry else None,
            )
            for entry in document["images"]
        ),
        tuple(
            Annotation(
                id=entry["id"],
                image_id=entry["image_id"],
                category_id=entry["category_id"],
                bbox_xywh=tuple(entry["bbox"]),
                segmentation=entry["segmentation"] or None,
                area=entry["area"],
                iscrowd=bool(entry["iscrowd"]),
            )
            for entry in document["annotations"]
        ),
        tuple(Category(entry["id"], entry["name"]) for entry in document["categories"]),
    )
