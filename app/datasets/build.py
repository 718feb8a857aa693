"""A folder of labelled images → the splits to train, validate and test on."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from app.datasets.coco import Category, Dataset
from app.datasets.formats import COCO, Source, choose
from app.datasets.formats.coco import JSON_NAMES
from app.datasets.shapes import ShapesConfig, is_shapes, make_shapes
from app.errors import UserError
from app.files import read_json


@dataclass(frozen=True)
class Splits:
    """Splits that share their categories; `notes` are things to tell the user."""

    train: Dataset
    valid: Dataset
    test: Dataset | None
    notes: tuple[str, ...]

    def map(self, change: Callable[[Dataset], Dataset]) -> Splits:
        """The splits with each dataset changed alike."""
        test = None if self.test is None else change(self.test)
        return Splits(change(self.train), change(self.valid), test, self.notes)


def load_splits(
    folder: Path,
    *,
    format: str = "auto",
    valid_fraction: float = 0.15,
    seed: int = 0,
    limit: int | None = None,
) -> Splits:
    """Read the dataset in `folder`: its train, valid (or val) and test folders, or itself.

    Args:
        folder: holds the split folders, or one COCO JSON, which then is the training set; or the
            files of another format.
        format: a key of `formats`, or auto: COCO JSON is looked for first, then the others.
        valid_fraction: of the training images, 0 to 1, set aside where there is no validation set.
        seed: of that choice, and of `limit`'s.
        limit: train on that many images, chosen at random; None for all.

    Raises:
        UserError: with every problem of every split, or with what was looked for and not found.
    """
    _check_arguments(valid_fraction, limit)
    sources, notes = _find_sources(folder, format)
    splits = _share_categories(_read_all(sources))
    train, test = splits["train"], splits.get("test")
    valid = splits.get("valid")
    if valid is None:
        train, valid, note = _set_aside(train, valid_fraction, seed)
        notes.append(note)
    if limit is not None and limit < len(train.images):
        notes.append(f"training on {limit} of {len(train.images)} images (limit, seed {seed})")
        train = _subset(train, _choose(train, limit, seed))
    if not train.annotations:
        raise UserError(
            f"{folder}: the {len(train.images)} images left to train on have no annotations; "
            "raise limit, lower valid_fraction, or take another seed"
        )
    notes += _untrained_classes(train, {"validation": valid, "test": test})
    return Splits(train, valid, test, tuple(notes))


def shapes_dataset(cache: Path, **shape_args: Any) -> Path:
    """The synthetic set with these settings of `make_shapes` at `cache`, made where it is not.

    Returns:
        `cache`, to be given to `load_splits`.

    Raises:
        UserError: `cache` holds something other than a set of shapes, or a setting is out of range.
    """
    config = ShapesConfig(**shape_args)
    if not (is_shapes(cache) and _is_complete(cache, config)):
        make_shapes(cache, **shape_args)
    return cache


def _is_complete(cache: Path, config: ShapesConfig) -> bool:
    document = read_json(cache / "train" / JSON_NAMES[0])
    images = {split: len([*cache.glob(f"{split}/images/*.png")]) for split in ("train", "valid")}
    wanted = {"train": config.train, "valid": config.valid}
    return document.get("info") == config.info() and images == wanted


def _check_arguments(valid_fraction: float, limit: int | None) -> None:
    problems = []
    if not 0 < valid_fraction < 1:
        problems.append(f"valid_fraction is {valid_fraction}: must be between 0 and 1")
    if limit is not None and limit < 1:
        problems.append(f"limit is {limit}: must be 1 or more images")
    if problems:
        raise UserError(problems)


def _find_sources(folder: Path, key: str) -> tuple[dict[str, Source], list[str]]:
    """Each split that is there, `train` always; and a note where the format is not plain COCO."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the dataset")
    format = choose(folder, key)
    sources = format.sources(folder)
    if "train" not in sources:
        there = ", ".join(f"'{source.where.name}'" for source in sources.values())
        raise UserError(f"{folder}: no 'train' folder to train on; there is {there}")
    if key != "auto":
        return sources, [f"read as {format.name}, as dataset.format says"]
    return sources, [] if format is COCO else [f"no COCO JSON: read as {format.name}"]


def _read_all(sources: Mapping[str, Source]) -> dict[str, Dataset]:
    """Read every split, gathering the problems of all."""
    datasets, problems = {}, []
    for split, source in sources.items():
        path = source.where
        try:
            datasets[split] = dataset = source.read()
        except UserError as error:
            problems += error.problems
            continue
        if not dataset.images:
            problems.append(f"{path}: lists no images; add some, or remove this split")
        elif split == "train" and not dataset.annotations:
            problems.append(f"{path}: has no annotations; label the images first")
    if problems:
        raise UserError(problems)
    return datasets


def _share_categories(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Give all splits the union of their categories, matched by name.

    An id stays as in the first split that has the name, unless another name has taken it.
    """
    ids: dict[str, int] = {}
    for dataset in splits.values():
        for category in dataset.categories:
            taken = set(ids.values())
            if category.name not in ids:
                free = next(id for id in count(max(taken, default=0) + 1) if id not in taken)
                ids[category.name] = free if category.id in taken else category.id
    categories = tuple(Category(id, name) for name, id in ids.items())
    return {split: _renumber(dataset, ids, categories) for split, dataset in splits.items()}


def _renumber(dataset: Dataset, ids: dict[str, int], categories: tuple[Category, ...]) -> Dataset:
    new_ids = {category.id: ids[category.name] for category in dataset.categories}
    annotations = tuple(
        replace(annotation, category_id=new_ids[annotation.category_id])
        for annotation in dataset.annotations
    )
    return Dataset(dataset.images, annotations, categories)


def _set_aside(train: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset, str]:
    """Training set, validation set made from it, and what to tell the user."""
    total = len(train.images)
    if total == 1:
        note = "no validation split, and one training image: it is validated on as well"
        return train, train, f"{note}, so the figures say nothing about new images"
    size = min(max(1, round(total * fraction)), total - 1)
    chosen = _choose(train, size, seed)
    rest = {image.id for image in train.images} - chosen
    note = (
        f"no validation split: {size} of {total} training images "
        f"({fraction * 100:g} %, seed {seed}) set aside for validation"
    )
    return _subset(train, rest), _subset(train, chosen), note


def _choose(dataset: Dataset, size: int, seed: int) -> set[int]:
    """Ids of images, chosen at random but not by their order in the JSON."""
    return set(random.Random(seed).sample(sorted(image.id for image in dataset.images), size))


def _subset(dataset: Dataset, image_ids: Collection[int]) -> Dataset:
    return replace(
        dataset,
        images=tuple(image for image in dataset.images if image.id in image_ids),
        annotations=tuple(a for a in dataset.annotations if a.image_id in image_ids),
    )


def _untrained_classes(train: Dataset, others: Mapping[str, Dataset | None]) -> list[str]:
    trained, notes = _labelled(train), []
    for title, dataset in others.items():
        if dataset is not None and (missing := sorted(_labelled(dataset) - trained)):
            classes = ", ".join(f"'{name}'" for name in missing)
            notes.append(f"{title} has objects of {classes}, which no training image has")
    return notes


def _labelled(dataset: Dataset) -> set[str]:
    """Names of the classes with at least one annotation."""
    used = {annotation.category_id for annotation in dataset.annotations}
    return {category.name for category in dataset.categories if category.id in used}
