"""A `Dataset` → YOLO segmentation in Ultralytics' layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.datasets.coco import Dataset, Image
from app.datasets.formats.outlines import Rle
from app.errors import UserError
from app.files import atomic_folder, write_text

Points = NDArray[np.float64]  # (points, xy), pixels


def write_yolo(dataset: Dataset, folder: Path, split: str = "train") -> None:
    """Write images/<split>, labels/<split> and a data.yaml that names all splits in `folder`.

    A mask becomes one polygon along its pixels' edges, its parts and holes joined by bridges of no
    width, as Ultralytics' converters join them: nothing of the mask is lost. An object without a
    mask becomes a box. Crowds are left out, as those converters do.

    Args:
        split: train, val or test.

    Raises:
        UserError: the split is there already, or its data.yaml has other classes.
    """
    images, labels, config = folder / "images" / split, folder / "labels" / split, "data.yaml"
    problems = [f"{path}: exists; remove it first" for path in (images, labels) if path.exists()]
    if (folder / config).is_file():
        names = (yaml.safe_load((folder / config).read_text(encoding="utf-8")) or {}).get("names")
        if names != dataset.class_names:
            problems.append(f"{folder / config}: has the classes {names}; write to another folder")
    if problems:
        raise UserError(problems)
    numbers = {category.id: index for index, category in enumerate(dataset.categories)}
    with atomic_folder(images) as new_images, atomic_folder(labels) as new_labels:
        for image, name in _names(dataset):
            shutil.copyfile(image.path, new_images / name)
            lines = [
                label_line(
                    *(numbers[a.category_id], a.segmentation, a.bbox_xywh),
                    *(image.width, image.height),
                )
                for a in dataset.annotations_by_image[image.id]
                if not a.iscrowd
            ]
            (new_labels / name).with_suffix(".txt").write_text("".join(lines))
    splits = {path.name: f"images/{path.name}" for path in sorted((folder / "images").iterdir())}
    # without `path`, Ultralytics takes the folder that data.yaml is in
    content = {**splits, "names": dataset.class_names}
    write_text(folder / config, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _names(dataset: Dataset) -> list[tuple[Image, str]]:
    """A file name for each image; those that would share a label file begin with the image's id."""
    stems = [image.path.stem for image in dataset.images]
    return [
        (i, i.path.name if stems.count(i.path.stem) == 1 else f"{i.id}_{i.path.name}")
        for i in dataset.images
    ]


def label_line(
    number: int, mask: Rle | None, bbox_xywh: Sequence[float], width: int, height: int
) -> str:
    """`class x1 y1 x2 y2 …`, or `class cx cy w h` where there is no mask; 0..1."""
    if mask is None:
        x, y, w, h = bbox_xywh
        points = np.array([[x + w / 2, y + h / 2], [w, h]])
    else:
        points = outline(mask)
    parts = (points / [width, height]).ravel()
    return " ".join([str(number), *(f"{part:.7g}" for part in parts)]) + "\n"


def outline(mask: Rle) -> Points:
    """One polygon along the edges of a mask's pixels: (points, xy), pixels, to be filled even-odd.

    On the mask at twice its size, a left half-pixel has an even and a right one an odd number, so
    that (number + 1) // 2 is the edge that it touches; for rows alike.
    """
    left, top, width, height = (int(side) for side in coco_mask.toBbox(mask))
    crop = coco_mask.decode(mask)[top : top + height, left : left + width]
    doubled = np.kron(crop, np.ones((2, 2), dtype=np.uint8))
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [(contour[:, 0].astype(np.int64) + 1) // 2 for contour in contours]
    rings.sort(key=len, reverse=True)
    joined = rings[0].astype(np.float64)
    for ring in rings[1:]:
        joined = _bridge(joined, ring.astype(np.float64))
    return joined + np.array([left, top])


def _bridge(polygon: Points, ring: Points) -> Points:
    """The polygon with a ring joined to it where they are nearest, there and back on one line."""
    distances = ((polygon[:, None] - ring[None]) ** 2).sum(axis=2)
    at, start = np.unravel_index(int(distances.argmin()), distances.shape)
    tour = np.roll(ring, -start, axis=0)
    return np.concatenate([polygon[: at + 1], tour, tour[:1], polygon[at:]])
