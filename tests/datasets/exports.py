"""Exports as Roboflow makes them, of two training images and one to validate on."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 40, 30
SQUARE = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
README = "\npotholes - v3 augmented\n==============================\n\nRoboflow is …\n"
IMAGES = {"train": ["road_jpg.rf.0a1b.jpg", "lane_jpg.rf.2c3d.jpg"], "valid": ["kerb.rf.4e.jpg"]}


def packed(files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(buffer, "JPEG")
    return buffer.getvalue()


def coco_export(*, masks: bool) -> bytes:
    """`coco-segmentation` or `coco`: category 0 is a placeholder, ids count from 0."""
    files: dict[str, bytes | str] = {"README.dataset.txt": README, "README.roboflow.txt": README}
    for split, names in IMAGES.items():
        files |= {f"{split}/{name}": jpeg() for name in names}
        document = _document(names, masks=masks)
        files[f"{split}/_annotations.coco.json"] = json.dumps(document)
    return packed(files)


def _document(names: list[str], *, masks: bool) -> dict[str, Any]:
    size, day = {"height": HEIGHT, "width": WIDTH}, "2024-01-02T03:04:05+00:00"
    box = {"bbox": [10, 5, 10, 10], "area": 100, "iscrowd": 0}
    return {
        "info": {"year": "2024", "version": "3", "description": "Exported from roboflow.com"},
        "licenses": [{"id": 1, "url": "https://…/by/4.0/", "name": "CC BY 4.0"}],
        "categories": [
            {"id": 0, "name": "potholes", "supercategory": "none"},
            {"id": 1, "name": "pothole", "supercategory": "potholes"},
        ],
        "images": [
            {"id": i, "license": 1, "file_name": name, **size, "date_captured": day}
            for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, **box, "segmentation": [SQUARE] * masks}
            for i in range(len(names))
        ],
    }


def yolo_export() -> bytes:
    """`yolov8`: a box for one training image, a polygon for the other."""
    config = (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
        "nc: 1\nnames: ['pothole']\n\n"
        "roboflow:\n  workspace: w\n  project: potholes\n  version: 3\n  license: CC BY 4.0\n"
    )
    files: dict[str, bytes | str] = {"data.yaml": config, "README.roboflow.txt": README}
    lines = ("0 0.375 0.3333 0.25 0.3333", "0 0.25 0.1667 0.5 0.1667 0.5 0.5 0.25 0.5")
    for split, names in IMAGES.items():
        for name, line in zip(names, lines, strict=False):
            files[f"{split}/images/{name}"] = jpeg()
            files[f"{split}/labels/{name.removesuffix('.jpg')}.txt"] = line
    return packed(files)
