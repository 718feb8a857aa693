"""The range of values of a dataset's images of more than 8 bits: one for all of them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from app.console import progress
from app.datasets.coco import Dataset
from app.datasets.duplicates import in_threads
from app.datasets.faults import Fault, Findings
from app.datasets.images import ImageError, read_header, read_values
from app.datasets.levels import Levels, describe, find_levels, widest

DARK = 0.02  # of the range, that the mean of all pixels must reach
COLORS = "of colours of 16 bits the upper 8 are read"


def share_levels(
    splits: Mapping[str, Dataset], faults: list[Fault], folder: Path
) -> tuple[dict[str, Dataset], list[Fault], list[str]]:
    """Give all images of more than 8 bits the widest range of any; return a note of it as well.

    Nothing is decoded where no image has more than 8 bits.

    Args:
        faults: those of the labels and headers, by which such images are known.

    Returns:
        The splits, the faults with the range in those of kind `bits`, and notes.
    """
    if not any(fault.kind == "bits" for fault in faults):
        return dict(splits), faults, []
    paths = {image.path for dataset in splits.values() for image in dataset.images}
    deep = [path for path in sorted(paths) if "bits" in read_header(path).mends]
    with progress("pixels of more than 8 bits: image", len(deep)) as advance:
        looks = list(in_threads(_look, deep, lambda done: advance(done, "")))
    found = {path: look for path, look in zip(deep, looks, strict=True) if look is not None}
    if not found:
        return dict(splits), faults, []
    ranges = {path: levels for path, (levels, _) in found.items() if levels is not None}
    levels = functools.reduce(widest, ranges.values()) if ranges else None
    text = describe(levels) if levels is not None else COLORS
    remedy = f"is read as upright RGB of 8 bits; {text}"
    faults = [replace(f, remedy=remedy) if f.kind == "bits" else f for f in faults]
    low, high = levels or (0.0, 1.0)
    brightness = sum(
        mean if own is None else (mean - low) / (high - low) for own, mean in found.values()
    ) / len(found)
    if brightness < DARK:
        findings = Findings(str(folder))
        remedy = (
            f"{text}, and the images are nearly black then (mean {brightness:.2%} of the range): "
            "scale them to 8 bits yourself, so that what is to be found can be seen"
        )
        findings.add("dark", "images", f"{len(found)} images", remedy)
        faults = [*faults, *findings.faults]
    if levels is not None:
        splits = {name: _with(dataset, ranges, levels) for name, dataset in splits.items()}
    return dict(splits), faults, [text]


def _with(dataset: Dataset, deep: Collection[Path], levels: Levels) -> Dataset:
    images = tuple(
        replace(image, levels=levels) if image.path in deep else image for image in dataset.images
    )
    return replace(dataset, images=images)


def levels_of(dataset: Dataset) -> Levels | None:
    """Return the range of a dataset's images of more than 8 bits; None where it has none."""
    return next((image.levels for image in dataset.images if image.levels is not None), None)


def _look(path: Path) -> tuple[Levels | None, float] | None:
    """Return an image's own range and the mean of its values; of colours None, and 0 to 1."""
    try:
        values = read_values(path)
    except ImageError:  # found and reported by a full decode
        return None
    if values.ndim > 2:
        return None, float(values[..., :3].mean()) / 255
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return find_levels(values), float(finite.mean()) if finite.size else 0.0
