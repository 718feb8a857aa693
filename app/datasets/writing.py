"""Checked splits → a folder of COCO JSON and upright RGB images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from app.datasets.build import JSON_NAMES, Splits
from app.datasets.coco import Dataset, Image
from app.datasets.duplicates import in_threads
from app.datasets.images import open_image, read_header
from app.errors import UserError
from app.files import read_json, write_json

BUILDER = "built by python -m app data build"


def is_built(folder: Path) -> bool:
    """Return whether `write_splits` wrote this folder."""
    try:
        document = read_json(folder / "train" / JSON_NAMES[0])
    except UserError:
        return False
    info = document.get("info") if isinstance(document, dict) else None
    return isinstance(info, dict) and info.get("description") == BUILDER


def write_splits(
    splits: Splits, folder: Path, info: dict[str, Any], on_image: Callable[[int], None]
) -> None:
    """Write train/, valid/ and test/, each `_annotations.coco.json` and `images/`.

    An image is copied byte for byte where it is upright RGB or grey, else written anew as PNG.

    Args:
        info: of each JSON's `info`, to which the split's content hash is added.
        on_image: is told how many are written.
    """
    done = 0

    def count(_: int) -> None:
        nonlocal done
        done += 1
        on_image(done)

    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    for name, dataset in parts.items():
        if dataset is not None:
            write_split(dataset, folder / name, info, count)


def write_split(
    dataset: Dataset, folder: Path, info: dict[str, Any], on_image: Callable[[int], None]
) -> None:
    """Write one split, as `write_splits` does."""
    (folder / "images").mkdir(parents=True)
    targets = _targets(dataset.images, folder / "images")
    work = partial(_write_image, targets=targets)
    list(in_threads(work, dataset.images, on_image))
    images = tuple(
        replace(image, path=targets[image.path], levels=None) for image in dataset.images
    )
    written = replace(dataset, images=images)
    document = written.to_json()
    for image in document["images"]:
        image["file_name"] = f"images/{Path(image['file_name']).name}"
    info = {"description": BUILDER, **info, "content_hash": written.content_hash()}
    write_json(folder / JSON_NAMES[0], {"info": info, **document})


def _targets(images: Sequence[Image], folder: Path) -> dict[Path, Path]:
    """Return a file for each image: its own name, or with its id before it where two share one."""
    names = [
        f"{image.path.stem}.png" if read_header(image.path).mends else image.path.name
        for image in images
    ]
    unique = len({name.casefold() for name in names}) == len(names)
    return {
        image.path: folder / (name if unique else f"{image.id}_{name}")
        for image, name in zip(images, names, strict=True)
    }


def _write_image(image: Image, targets: dict[Path, Path]) -> None:
    if read_header(image.path).mends:
        open_image(image.path, image.levels).save(targets[image.path])
    else:
        shutil.copyfile(image.path, targets[image.path])
