"""Labelled images in other formats than COCO JSON → the project's `Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.datasets.coco import Reading
from app.datasets.folders import split_folders
from app.datasets.formats import labelme, masks, via, voc, yolo


@dataclass(frozen=True)
class Source:
    """One split: where it lies, and how to read it."""

    where: Path
    read: Callable[[], Reading]


@dataclass(frozen=True)
class Format:
    """A format's name, what its folders look like, and its splits: train, valid, test."""

    name: str
    layout: str
    recognises: Callable[[Path], bool]
    sources: Callable[[Path], dict[str, Source]]


def detect(folder: Path) -> Format | None:
    """The format of the dataset in `folder`, told from its files; None where it is none of ours."""
    return next((format for format in FORMATS if format.recognises(folder)), None)


def understood() -> str:
    """The formats and their layouts, for an error message."""
    return "; ".join(f"{format.name} ({format.layout})" for format in FORMATS)


def _yolo_sources(folder: Path) -> dict[str, Source]:
    config = yolo.read_config(folder)
    return {
        split: Source(config.path, partial(yolo.read, config, split)) for split in config.splits
    }


def _by_folder(
    name: str,
    layout: str,
    recognises: Callable[[Path], bool],
    read: Callable[[Path, Path], Reading],
) -> Format:
    """A format in which each split has a folder of its own, or the dataset is one such folder.

    Args:
        read: of a split's folder and the dataset's, which its images must not leave.
    """

    def recognises_any(folder: Path) -> bool:
        return recognises(folder) or any(map(recognises, split_folders(folder).values()))

    def sources(folder: Path) -> dict[str, Source]:
        parts = {} if recognises(folder) else split_folders(folder)
        return {
            split: Source(part, partial(read, part, folder))
            for split, part in (parts or {"train": folder}).items()
        }

    return Format(name, layout, recognises_any, sources)


FORMATS = (
    Format("YOLO", "data.yaml, images/ and labels/", yolo.is_yolo, _yolo_sources),
    _by_folder("VGG Image Annotator", "via_region_data.json or project", via.is_via, via.read),
    _by_folder("LabelMe", "a JSON with 'shapes' an image", labelme.is_labelme, labelme.read),
    _by_folder("Pascal VOC", "Annotations/*.xml and JPEGImages/", voc.is_voc, voc.read),
    _by_folder("mask PNGs", "images/ and masks/*.png of object ids", masks.is_masks, masks.read),
)
