"""Labelled images in any format that is understood → the project's `Dataset`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.config.reading import ReadingConfig
from app.config.schema import FormatName
from app.datasets.coco import Reading, examine
from app.datasets.folders import split_folders
from app.datasets.formats import (
    cityscapes,
    coco,
    createml,
    cvat,
    datumaro,
    imagefolder,
    kitti,
    labelme,
    labelstudio,
    masks,
    panoptic,
    supervisely,
    tables,
    via,
    voc,
    voc_masks,
    yolo,
)
from app.datasets.formats.draft import Read
from app.datasets.formats.telling import FEW
from app.datasets.formats.unread import UNLABELLED, labels_there, name_classification, name_unread
from app.datasets.names import walk_images
from app.errors import UserError, nearest


@dataclass(frozen=True)
class Source:
    """One split: where it lies, and how to read it."""

    where: Path
    read: Callable[[], Reading]


@dataclass(frozen=True)
class Format:
    """A format, what its folders look like, and its splits: train, valid, test.

    Attributes:
        key: what `dataset.format` calls it.
        name: what people call it.
        reads: the decisions of `ReadingConfig` that its files may need.
    """

    key: FormatName
    name: str
    layout: str
    recognises: Callable[[Path], bool]
    sources: Callable[[Path, ReadingConfig], dict[str, Source]]
    reads: tuple[str, ...] = ()

    def check_decisions(self, reading: ReadingConfig) -> None:
        """Refuse decisions that nothing reads; crowds are settled alike in every format.

        Raises:
            UserError: names all of them.
        """
        given = reading.model_dump(exclude_defaults=True)
        problems = [
            f"--{key.replace('_', '-')} {value}: nothing reads it in a dataset that is read as "
            f"{self.name}; leave it out"
            for key, value in given.items()
            if key not in (*self.reads, "crowd")
        ]
        if problems:
            raise UserError(problems)


def detect(folder: Path) -> Format | None:
    """Return the format of the dataset in `folder`, told from its files; None where it is none."""
    return next((format for format in FORMATS if format.recognises(folder)), None)


def choose(folder: Path, key: str) -> Format:
    """Return the format of that key, or for `auto` the one that the files tell.

    Raises:
        UserError: no such key, or no dataset of that format in `folder`: says what was looked for.
    """
    choices = ["auto", *(format.key for format in FORMATS)]
    if key not in choices:
        raise UserError(f"format '{key}': there are {', '.join(choices)}.{nearest(key, choices)}")
    formats = [format for format in FORMATS if key in ("auto", format.key)]
    for format in formats:
        if format.recognises(folder):
            return format
    if key == "auto" and (inner := _inside(folder)):
        raise UserError(inner)
    if key == "auto" and (unread := name_unread(folder)):
        raise UserError(unread)
    # a single JSON that is broken, or of no known kind: reading it says what is wrong with it
    if COCO in formats and coco.find_jsons(folder):
        return COCO
    if key == "auto" and (classes := name_classification(folder)):
        raise UserError(classes)
    raise UserError(_nothing_found(folder, formats))


def _inside(folder: Path) -> str | None:
    """Return which folder to name, where one of this folder's holds a dataset by itself."""
    plain = (path for path in sorted(folder.iterdir()) if not path.is_symlink())
    inner = [path for path in plain if path.is_dir() and path.name[0] != "."][:FEW]
    found: list[tuple[Path, Format]] = []
    for path in inner:
        with contextlib.suppress(UserError):  # of a folder that nobody named
            if own := detect(path):
                found.append((path, own))
    if len(found) != 1:
        return None
    ((path, own),) = found
    return f"{folder}: no dataset lies in it, but {path.name}/ is {own.name}: name {path} instead"


def _nothing_found(folder: Path, formats: Sequence[Format]) -> str:
    there = sorted(path.name for path in folder.iterdir())
    if not there:
        return f"{folder}: the folder is empty; put images and their labels there, see docs/data.md"
    listed = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    looked_for = "; ".join(f"{format.name} ({format.layout})" for format in formats)
    alone = "" if any(labels_there(folder)) or not any(walk_images(folder)) else f". {UNLABELLED}"
    other = f". It looks like {detected.key}" if (detected := detect(folder)) else ""
    return (
        f"{folder}: no dataset found, in it or in its folders train, valid, val and test. "
        f"Looked for {looked_for}. There is: {listed}{other}{alone}"
    )


def _coco_sources(folder: Path, reading: ReadingConfig) -> dict[str, Source]:
    jsons = coco.find_jsons(folder)
    sources = {}
    for split, path in jsons.items():
        names = coco.image_names(folder, path)
        others = [other for other in jsons.values() if other != path]
        sources[split] = Source(path, partial(examine, path, names, reading, others))
    return sources


def _yolo_sources(folder: Path, _: ReadingConfig) -> dict[str, Source]:
    config = yolo.read_config(folder)
    return {
        split: Source(config.path, partial(yolo.read, config, split)) for split in config.splits
    }


def _mask_sources(folder: Path, reading: ReadingConfig) -> dict[str, Source]:
    return {
        split: Source(found.part.images, partial(masks.read, found, folder))
        for split, found in masks.find_splits(folder, reading).items()
    }


def _panoptic_sources(folder: Path, _: ReadingConfig) -> dict[str, Source]:
    return {
        split: Source(path, partial(panoptic.read, path, folder))
        for split, path in panoptic.find_jsons(folder).items()
    }


def _cityscapes_sources(folder: Path, _: ReadingConfig) -> dict[str, Source]:
    return {
        split: Source(part, partial(cityscapes.read, part, folder))
        for split, part in cityscapes.find_splits(folder).items()
    }


def _voc_mask_sources(folder: Path, reading: ReadingConfig) -> dict[str, Source]:
    parts = {} if voc_masks.is_voc_masks(folder) else split_folders(folder)
    if not parts:
        found = voc_masks.find_splits(folder, reading)
        return {s: Source(folder, partial(voc_masks.read, found, s)) for s in found.stems}
    return {
        split: Source(
            part, partial(voc_masks.read, voc_masks.find_splits(part, reading, whole=True), "train")
        )
        for split, part in parts.items()
    }


def _by_folder(
    key: FormatName,
    name: str,
    layout: str,
    recognises: Callable[[Path], bool],
    read: Callable[[Path, Path, ReadingConfig], Reading],
    reads: tuple[str, ...] = (),
) -> Format:
    """Make a format in which each split has a folder, or the dataset is one such folder.

    Args:
        read: of a split's folder, the dataset's, which its images must not leave, and what the user
            decided.
        reads: as `Format` has it.
    """

    def recognises_any(folder: Path) -> bool:
        return recognises(folder) or any(map(recognises, split_folders(folder).values()))

    def sources(folder: Path, reading: ReadingConfig) -> dict[str, Source]:
        parts = {} if recognises(folder) else split_folders(folder)
        return {
            split: Source(part, partial(read, part, folder, reading))
            for split, part in (parts or {"train": folder}).items()
        }

    return Format(key, name, layout, recognises_any, sources, reads)


def _by_splits(
    key: FormatName,
    name: str,
    layout: str,
    recognises: Callable[[Path], bool],
    splits: Callable[[Path, ReadingConfig], dict[str, Read]],
    reads: tuple[str, ...] = (),
) -> Format:
    """Make a format that finds its splits itself."""

    def sources(folder: Path, reading: ReadingConfig) -> dict[str, Source]:
        return {split: Source(folder, read) for split, read in splits(folder, reading).items()}

    return Format(key, name, layout, recognises, sources, reads)


COCO = Format(
    "coco",
    "COCO",
    f"{' or '.join(coco.JSON_NAMES)}, a single *.json, or annotations/instances_*.json",
    coco.is_coco,
    _coco_sources,
    reads=("boxes", "group_column", "accept_above"),
)
FORMATS = (
    # before COCO, whose keys its JSON has as well
    Format(
        "panoptic",
        "COCO panoptic",
        "panoptic_<split>.json and a folder of PNGs of its name",
        panoptic.is_panoptic,
        _panoptic_sources,
    ),
    COCO,
    _by_splits(
        "labelstudio",
        "Label Studio",
        "its JSON of tasks",
        labelstudio.is_label_studio,
        labelstudio.splits,
    ),
    _by_splits(
        "cvat",
        "CVAT for images",
        "annotations.xml with a root 'annotations'",
        cvat.is_cvat,
        cvat.splits,
    ),
    _by_splits(
        "datumaro",
        "Datumaro",
        "annotations/*.json with items and categories",
        datumaro.is_datumaro,
        datumaro.splits,
    ),
    _by_splits(
        "supervisely",
        "Supervisely",
        "ann/*.json and img/",
        supervisely.is_supervisely,
        supervisely.splits,
    ),
    Format(
        "yolo",
        "YOLO",
        "data.yaml, obj.data or classes.txt, images/ and labels/",
        yolo.is_yolo,
        _yolo_sources,
    ),
    _by_folder(
        "via",
        "VGG Image Annotator",
        "via_region_data.json or .csv, or a project",
        via.is_via,
        via.read,
        reads=("attribute",),
    ),
    _by_splits(
        "labelme", "LabelMe", "a JSON with 'shapes' an image", labelme.is_labelme, labelme.splits
    ),
    _by_splits("voc", "Pascal VOC", "Annotations/*.xml and JPEGImages/", voc.is_voc, voc.splits),
    _by_splits(
        "imagefolder",
        "HuggingFace's imagefolder",
        "metadata.jsonl with objects",
        imagefolder.is_imagefolder,
        imagefolder.splits,
        reads=("boxes", "group_column", "accept_above"),
    ),
    _by_folder(
        "createml",
        "CreateML",
        "a JSON list with coordinates",
        createml.is_createml,
        createml.read,
    ),
    _by_splits(
        "csv",
        "CSV of boxes",
        f"a table of {', '.join(tables.COLUMNS)}, as TensorFlow's, or RetinaNet's",
        tables.is_table,
        tables.splits,
        reads=("group_column",),
    ),
    _by_splits("kitti", "KITTI", "label_2/*.txt and image_2/", kitti.is_kitti, kitti.splits),
    Format(
        "cityscapes",
        "Cityscapes",
        "gtFine/train/<city>/*_gtFine_instanceIds.png or polygons, and leftImg8bit/",
        cityscapes.is_cityscapes,
        _cityscapes_sources,
    ),
    Format(
        "voc-masks",
        "Pascal VOC's masks",
        "SegmentationClass/ and JPEGImages/",
        lambda folder: any(map(voc_masks.is_voc_masks, (folder, *split_folders(folder).values()))),
        _voc_mask_sources,
        reads=("void",),
    ),
    Format(
        "masks",
        "mask PNGs",
        "images/ and masks/*.png, or masks beside images as x_mask.png",
        masks.is_masks,
        _mask_sources,
        reads=("void", "masks"),
    ),
)
