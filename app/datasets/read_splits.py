"""The configuration's dataset, wherever it comes from → the splits that a run reads."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from app.config.schema import Config
from app.datasets import sources
from app.datasets.build import Splits, load_splits, settings_advice
from app.datasets.coco import Dataset
from app.datasets.decoding import decoding_problems
from app.datasets.prompts import name_classes, read_prompts

log = logging.getLogger(__name__)


def read_splits(config: Config, *, folds: bool = False) -> Splits:
    """Read the dataset that is named, or draw the synthetic shapes; name its classes by prompts.

    Args:
        folds: part the images into those of `dataset.folds`; else a validation set is set aside.

    Raises:
        UserError: the dataset is not to be had, or has problems; names every one.
    """
    dataset = config.dataset
    splits = load_splits(
        sources.fetch(dataset, config.seed),
        format=dataset.format,
        valid_fraction=dataset.valid_fraction,
        test_fraction=dataset.test_fraction,
        pattern=dataset.group,
        folds=dataset.folds if folds else "none",
        max_drop=dataset.max_drop,
        reading=dataset.reading,
        seed=config.seed,
        limit=dataset.limit,
    )
    advice = [fault.remedy for fault in settings_advice(splits, config)]
    splits = replace(splits, notes=(*splits.notes, *advice))
    if dataset.prompts is not None:
        prompts = read_prompts(Path(dataset.prompts), splits.train.categories)
        splits = splits.map(lambda split: name_classes(split, prompts))
    if dataset.bad_images == "skip":
        splits = splits.map(_without_bad_images)
    return splits


def _without_bad_images(dataset: Dataset) -> Dataset:
    """Leave out the images that cannot be decoded; log each, and their number."""
    bad = decoding_problems([image.path for image in dataset.images])
    for problem in bad.values():
        log.warning("note: left out (dataset.bad_images=skip): %s", problem)
    if bad:
        log.warning("note: %d of %d images left out", len(bad), len(dataset.images))
    return dataset.subset(image.id for image in dataset.images if image.path not in bad)
