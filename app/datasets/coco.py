"""The dataset's types, and COCO JSON in and out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.check import (
    Findings,
    check,
    check_files,
    clip_box,
    decode_counts,
    is_absent,
    placeholder_ids,
)
from app.errors import UserError
from app.files import read_json, write_json


@dataclass(frozen=True)
class Image:
    """An image file; width and height in pixels, after its EXIF rotation."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Annotation:
    """One labelled object.

    Attributes:
        bbox_xywh: x, y, width, height in pixels, inside the image.
        segmentation: compressed COCO RLE {"size": [height, width], "counts": str}, or None where
            the source has boxes only.
        area: square pixels, as the source says it (Roboflow writes the box's), else the mask's,
            else the box's.
    """

    id: int
    image_id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]
    segmentation: dict[str, Any] | None
    area: float
    iscrowd: bool


@dataclass(frozen=True)
class Category:
    """A class: what the model is asked for, and other words for it, drawn in training."""

    id: int
    name: str
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    images: tuple[Image, ...]
    annotations: tuple[Annotation, ...]
    categories: tuple[Category, ...]

    @cached_property
    def annotations_by_image(self) -> dict[int, list[Annotation]]:
        """Annotations by image id; an image without objects has an empty list."""
        grouped: dict[int, list[Annotation]] = {image.id: [] for image in self.images}
        for annotation in self.annotations:
            grouped[annotation.image_id].append(annotation)
        return grouped

    @property
    def class_names(self) -> list[str]:
        return [category.name for category in self.categories]

    def subset(self, image_ids: Iterable[int]) -> Dataset:
        """These images and their annotations; all categories."""
        kept = set(image_ids)
        images = tuple(image for image in self.images if image.id in kept)
        annotations = tuple(a for a in self.annotations if a.image_id in kept)
        return Dataset(images, annotations, self.categories)

    def content_hash(self) -> str:
        """Hex SHA-256 of the labels and of each image's name and bytes: wherever it lies.

        Sizes stand for the image's contents: hashing each pixel would cost a read of the whole set.
        """
        content = self.to_json()
        for entry, image in zip(content["images"], self.images, strict=True):
            entry["file_name"] = image.path.name
            entry["bytes"] = image.path.stat().st_size
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Strict COCO: absolute file names; `segmentation` is RLE, or [] for boxes only."""
        return {
            "images": [
                {"id": i.id, "file_name": str(i.path), "width": i.width, "height": i.height}
                for i in self.images
            ],
            "annotations": [_annotation_to_json(a) for a in self.annotations],
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def _annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    return {
        "id": annotation.id,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.bbox_xywh),
        "area": annotation.area,
        "iscrowd": int(annotation.iscrowd),
        "segmentation": annotation.segmentation or [],
    }


def write(dataset: Dataset, path: Path) -> None:
    """Write the dataset as COCO JSON, whole or not at all."""
    write_json(path, dataset.to_json())


def read(json_path: Path, image_roots: Sequence[Path]) -> Dataset:
    """Read a COCO JSON and check it whole.

    Polygons and uncompressed RLE become compressed RLE; missing `iscrowd`, `area` and `bbox` are
    filled in; boxes are clipped to their image; placeholder categories are dropped.

    Args:
        json_path: the COCO JSON.
        image_roots: folders in which its images are looked for, as the JSON names them, then
            under `images/`.

    Raises:
        UserError: with every problem of the file and of its images.
    """
    document = read_json(json_path)
    problems = check(document, str(json_path))
    files: dict[int, Path] = {}
    if isinstance(document, dict):
        files, file_problems = check_files(document, str(json_path), image_roots)
        problems += file_problems
    if problems:
        raise UserError(problems)
    images = tuple(
        Image(entry["id"], files[entry["id"]], entry["width"], entry["height"])
        for entry in document["images"]
    )
    dropped = placeholder_ids(document)
    categories = tuple(
        Category(entry["id"], entry["name"].strip())
        for entry in document["categories"]
        if entry["id"] not in dropped
    )
    annotations = _read_annotations(document["annotations"], images, str(json_path))
    return Dataset(images, annotations, categories)


def _read_annotations(
    entries: list[dict[str, Any]], images: Sequence[Image], where: str
) -> tuple[Annotation, ...]:
    sizes = {image.id: (image.width, image.height) for image in images}
    # pycocotools takes a match with annotation 0 for no match (cocoeval.py, `dtm`), and Roboflow
    # counts from 0: a perfect detection of that object would score AP 0.
    shift = max(0, 1 - min((entry["id"] for entry in entries), default=1))
    found, annotations = Findings(where), []
    for index, entry in enumerate(entries):
        annotation = _read_annotation(entry, entry["id"] + shift, *sizes[entry["image_id"]])
        if annotation.segmentation is not None and not coco_mask.area(annotation.segmentation):
            place, remedy = f"annotations[{index}].segmentation", "covers no pixel; delete it"
            found.add("segmentation", place, entry["segmentation"], remedy)
        annotations.append(annotation)
    if problems := found.lines():
        raise UserError(problems)
    return tuple(annotations)


def _read_annotation(entry: dict[str, Any], id: int, width: int, height: int) -> Annotation:
    segmentation = _compress(entry.get("segmentation"), width, height)
    box: list[float] = entry.get("bbox") or coco_mask.toBbox(segmentation).tolist()
    bbox_xywh = clip_box(box, width, height)
    area = entry.get("area")
    if area is None:
        area = coco_mask.area(segmentation) if segmentation else bbox_xywh[2] * bbox_xywh[3]
    return Annotation(
        id=id,
        image_id=entry["image_id"],
        category_id=entry["category_id"],
        bbox_xywh=bbox_xywh,
        segmentation=segmentation,
        area=float(area),
        iscrowd=bool(entry.get("iscrowd")),
    )


def _compress(segmentation: Any, width: int, height: int) -> dict[str, Any] | None:
    """Checked polygons or RLE as one compressed RLE; None where there is no segmentation."""
    if is_absent(segmentation):
        return None
    if isinstance(segmentation, dict):
        runs = _join_empty_runs(decode_counts(segmentation["counts"], width * height))
        uncompressed = {"size": [height, width], "counts": runs.tolist()}
        rle = coco_mask.frPyObjects(uncompressed, height, width)
    else:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _join_empty_runs(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same mask without empty runs past the first, at which pycocotools' merge stops short."""
    ends = np.cumsum(runs)
    foreground = np.arange(len(runs)) % 2
    ends, foreground = ends[runs > 0], foreground[runs > 0]
    last_of_value = np.append(np.diff(foreground) != 0, True)
    joined = np.diff(ends[last_of_value], prepend=0)
    return joined if not foreground[0] else np.insert(joined, 0, 0)
