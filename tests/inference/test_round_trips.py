"""What is written of detections is read again by the project's own readers, as it was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.config.compose import load_config
from app.config.reading import ReadingConfig
from app.datasets.build import survey
from app.datasets.checked_copy import build
from app.datasets.coco import Dataset
from app.evaluation import record
from app.evaluation.record import Record
from app.inference.detections import Detections
from app.inference.masks import place
from app.inference.outputs import coco_results, write_images
from app.inference.tables import TABLES

WIDTH, HEIGHT = 120, 80
PROMPTS = ("cat", "a/b: *ring*")
Thing = tuple[str, tuple[float, ...], np.ndarray]  # class, x y width height, mask


def _found(*drawn: tuple[int, Callable[[np.ndarray], object]]) -> Detections:
    """Return detections of these prompts, whose masks are drawn by these functions."""
    masks = np.zeros((len(drawn), HEIGHT, WIDTH), np.uint8)
    for mask, (_, draw) in zip(masks, drawn, strict=True):
        draw(mask)
    rles = [place(mask.astype(bool), 0, 0, HEIGHT, WIDTH) for mask in masks]
    boxes = np.array([coco_mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.linspace(0.9, 0.5, len(drawn), dtype=np.float32)
    prompts = np.array([prompt for prompt, _ in drawn], dtype=np.int64)
    return Detections(boxes, scores, prompts, PROMPTS, rles, WIDTH, HEIGHT)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Detections]:
    """Rings, discs that touch nothing, a square at the edge, and an image of nothing."""
    found = {
        "a.png": _found(
            (1, lambda mask: cv2.circle(mask, (40, 40), 30, 1, 8)),
            (0, lambda mask: cv2.circle(mask, (40, 40), 9, 1, -1)),
            (0, lambda mask: cv2.rectangle(mask, (100, 60), (119, 79), 1, -1)),
        ),
        "b c.png": _found(
            (1, lambda mask: cv2.ellipse(mask, (60, 30), (50, 12), 20, 0, 360, 1, -1)),
            (1, lambda mask: cv2.circle(mask, (10, 70), 6, 1, -1)),
        ),
        "d.png": _found(),
    }
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(found):
        noise = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / name)
    return found


def _write(kind: str, folder: Path, images: dict[str, Detections]) -> None:
    """Write what `infer --save KIND` does, where the images lie in `folder/images`."""
    for name, found in images.items():
        with Image.open(folder / "images" / name) as image:
            write_images(folder, Path(name).stem, image.convert("RGB"), found, [kind])
    if kind in TABLES:
        path, write = TABLES[kind]
        write(folder / path, [], PROMPTS)


def _things(dataset: Dataset) -> dict[str, list[Thing]]:
    names = {category.id: category.name for category in dataset.categories}
    return {
        image.path.name: [
            (names[a.category_id], a.bbox_xywh, coco_mask.decode(a.segmentation).astype(bool))
            for a in dataset.annotations_by_image[image.id]
        ]
        for image in dataset.images
    }


def _check(dataset: Dataset, images: dict[str, Detections], names: tuple[str, ...]) -> None:
    """Every object is there once, of its class, to a pixel of its box and 0.99 of its mask."""
    read = _things(dataset)
    assert read.keys() == images.keys()
    for image, found in images.items():
        left = read[image]
        assert len(left) == len(found)
        truth = zip(found.prompt_ids, found.boxes_xyxy, found.bool_masks(), strict=True)
        for prompt, (x1, y1, x2, y2), mask in truth:
            shares = [float((mask & m).sum() / (mask | m).sum()) for _, _, m in left]
            name, box, _ = left.pop(int(np.argmax(shares)))
            assert max(shares) >= 0.99
            assert name == names[prompt]
            assert np.allclose(box, [x1, y1, x2 - x1, y2 - y1], atol=1)


@pytest.mark.parametrize(
    ("kind", "names", "masks"),
    [
        ("yolo", PROMPTS, "auto"),
        ("semantic", PROMPTS, "auto"),
        ("instances", ("object", "object"), "objects"),  # which hold no classes
    ],
)
def test_what_infer_writes_beside_images_is_a_dataset(
    tmp_path: Path, images: dict[str, Detections], kind: str, names: tuple[str, ...], masks: str
) -> None:
    _write(kind, tmp_path, images)
    read = survey(tmp_path, "auto", ReadingConfig.model_validate({"masks": masks}))
    assert not [str(fault) for fault in read.faults if fault.action != "warning"]
    _check(read.splits["train"], images, names)
    copy = tmp_path / "copy"
    build(tmp_path, copy, load_config([f"dataset.reading.masks={masks}"]))
    parts = [coco for coco in survey(copy).splits.values() if coco.images]
    whole = {name: found for part in parts for name, found in _things(part).items()}
    for part in parts:
        _check(part, {name: images[name] for name in _things(part)}, names)
    assert whole.keys() == images.keys()


def test_coco_results_are_read_beside_their_truth(
    tmp_path: Path, images: dict[str, Detections]
) -> None:
    _write("yolo", tmp_path, images)
    truth = survey(tmp_path).splits["train"]
    results = [
        result
        for image in truth.images
        for result in coco_results(images[image.path.name], image.id, [1, 2])
    ]
    record.write(tmp_path / "run", Record("valid", truth, results))
    assert record.read(tmp_path / "run") == Record("valid", truth, results)
    assert json.loads((tmp_path / "run" / "predictions" / "valid.json").read_text()) == results
