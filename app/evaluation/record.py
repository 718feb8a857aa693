"""Write the results of an evaluation into its folder, and read them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.config.schema import problems_of
from app.datasets import coco
from app.datasets.coco import Annotation, Category, Dataset, Image
from app.datasets.geometry import LARGEST_NUMBER, MAX_SIDE, rle_fault
from app.datasets.image_files import is_unicode
from app.errors import UserError
from app.evaluation.metrics import by_class
from app.evaluation.off_prompt import Firing, OffPrompts
from app.evaluation.results import read_results
from app.evaluation.run_files import shortened
from app.files import csv_text, read_json, write_csv, write_json

if TYPE_CHECKING:
    from app.evaluation.validate import Validation

FOLDER = "predictions"
BY_CLASS = "metrics_by_class.csv"
_TRUTH = "_truth.json"
BEFORE = "before.json"
EPOCHS = f"{FOLDER}/epochs"


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
        UserError: the folder holds none, or one that is not as it was written.
    """
    splits = _splits(folder)
    if not splits:
        raise UserError(
            f"{folder}: holds no evaluation (predictions/*{_TRUTH}). Name the --output-dir of a "
            "finished training, or of python -m app evaluate"
        )
    results, truth = _files(folder, splits[0])
    dataset = _read_truth(truth)
    return Record(splits[0], dataset, read_results(results, dataset))


def write_before(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write `predictions/before.json`: the boxes that were found before training."""
    kept = ("image_id", "category_id", "bbox", "score")
    write_json(folder / FOLDER / BEFORE, [{key: each[key] for key in kept} for each in results])


def read_before(folder: Path, truth: Dataset) -> list[dict[str, Any]] | None:
    """Read what was found in the images of `truth` before training; None where it was not kept.

    Raises:
        UserError: it is not as it was written.
    """
    file = folder / FOLDER / BEFORE
    return read_results(file, truth) if file.exists() else None


def write_epoch(folder: Path, epoch: int, validation: Validation) -> None:
    """Write `predictions/epochs/<epoch>.json` and the firings on nouns beside it."""
    results, firings = _epoch_files(folder, epoch)
    off = validation.off_prompts
    write_json(
        firings, {"nouns": list(off.nouns), "firings": [asdict(each) for each in off.firings]}
    )
    write_json(results, validation.results)


def epochs(folder: Path) -> list[int]:
    """Return the epochs whose results are there, in their order."""
    return sorted(int(file.stem) for file in (folder / EPOCHS).glob("[0-9]*.json"))


def read_epoch(folder: Path, epoch: int, truth: Dataset) -> tuple[list[dict[str, Any]], OffPrompts]:
    """Read what a validation found, as `write_epoch` wrote it.

    Raises:
        UserError: it is not there, or not as it was written.
    """
    results, firings = _epoch_files(folder, epoch)
    try:
        found = _Firings.model_validate(read_json(firings))
    except ValidationError as error:
        raise UserError(shortened(firings, problems_of(error))) from None
    fired = tuple(Firing(each.image_id, each.prompt, each.score) for each in found.firings)
    return read_results(results, truth), OffPrompts(tuple(found.nouns), fired)


def _epoch_files(folder: Path, epoch: int) -> tuple[Path, Path]:
    """Return the paths of the results and of the firings."""
    return folder / EPOCHS / f"{epoch}.json", folder / EPOCHS / f"firings-{epoch}.json"


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the paths of results and truth."""
    return folder / FOLDER / f"{split}.json", folder / FOLDER / f"{split}{_TRUTH}"


def _splits(folder: Path) -> list[str]:
    """Return the splits with results and truth: one, or more where a writer was killed."""
    truths = sorted((folder / FOLDER).glob(f"*{_TRUTH}"))
    splits = [file.name.removesuffix(_TRUTH) for file in truths]
    return [split for split in splits if _files(folder, split)[0].exists()]


# --- the truth, as `coco.write` wrote it; its images need not be there

_Id = Annotated[int, Field(gt=-(2**63), lt=2**63)]
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
_Number = Annotated[float, Field(gt=-LARGEST_NUMBER, lt=LARGEST_NUMBER)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Image(_Entry):
    id: _Id
    file_name: str
    width: _Side
    height: _Side
    levels: Annotated[list[_Number], Field(min_length=2, max_length=2)] | None = None


class _Annotation(_Entry):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    segmentation: dict[str, Any] | Annotated[list[Any], Field(max_length=0)]
    area: _Number
    iscrowd: int


class _Firing(_Entry):
    image_id: _Id
    prompt: str
    score: _Number


class _Firings(_Entry):
    nouns: list[str]
    firings: list[_Firing]


class _Category(_Entry):
    id: _Id
    name: str


class _Truth(_Entry):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Annotation]
    categories: Annotated[list[_Category], Field(min_length=1)]


def _read_truth(file: Path) -> Dataset:
    try:
        truth = _Truth.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(shortened(file, problems_of(error))) from None
    if problems := [*_problems(truth)]:
        raise UserError(shortened(file, problems))
    return Dataset(
        tuple(
            Image(
                entry.id,
                Path(entry.file_name),
                entry.width,
                entry.height,
                None if entry.levels is None else (entry.levels[0], entry.levels[1]),
            )
            for entry in truth.images
        ),
        tuple(
            Annotation(
                id=entry.id,
                image_id=entry.image_id,
                category_id=entry.category_id,
                bbox_xywh=(entry.bbox[0], entry.bbox[1], entry.bbox[2], entry.bbox[3]),
                segmentation=entry.segmentation if isinstance(entry.segmentation, dict) else None,
                area=entry.area,
                iscrowd=bool(entry.iscrowd),
            )
            for entry in truth.annotations
        ),
        tuple(Category(entry.id, entry.name) for entry in truth.categories),
    )


def _problems(truth: _Truth) -> Iterator[str]:
    """Yield what is wrong between the entries: ids that are taken or lead nowhere, masks."""
    sizes = {image.id: (image.width, image.height) for image in truth.images}
    categories = {category.id for category in truth.categories}
    for key in ("images", "annotations", "categories"):
        entries = getattr(truth, key)
        if len({entry.id for entry in entries}) < len(entries):
            yield f"{key}: two have one id"
    for category in truth.categories:
        if not is_unicode(category.name):
            yield f"categories: {category.name!r} is no text"
    for index, entry in enumerate(truth.annotations):
        place = f"annotations.{index}"
        if min(entry.bbox[2:]) < 0:
            yield f"{place}: bbox is {entry.bbox}: must have a width and a height of 0 or more"
        if entry.category_id not in categories:
            yield f"{place}: category_id is {entry.category_id}, and there is no such category"
        if entry.image_id not in sizes:
            yield f"{place}: image_id is {entry.image_id}, and there is no such image"
        elif isinstance(entry.segmentation, dict) and (
            fault := rle_fault(entry.segmentation, *sizes[entry.image_id])
        ):
            yield f"{place}: segmentation {fault}"
