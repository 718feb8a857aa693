"""Small labelled scenes, to be written in any format, and what a reader makes of them.

A scene is an image of 160 x 120 pixels with a red circle and a blue rectangle, and the objects in
it: class, x, y and side in pixels. Each situation of this folder is built by code, with the source
of it in a comment and the right answer beside it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from app.config.reading import ReadingConfig
from app.datasets.build import Survey, advise, load_splits, make_splits, survey
from app.datasets.coco import Dataset
from app.datasets.faults import Action
from app.errors import UserError

WIDTH, HEIGHT = 160, 120
CLASSES = ("circle", "rectangle")
Thing = tuple[str, int, int, int]  # class, x, y, side


def scene(seed: int) -> tuple[Image.Image, list[Thing]]:
    """Draw a scene that no other seed draws."""
    chance = random.Random(seed)
    image = Image.new("RGB", (WIDTH, HEIGHT), (230, 220, 210 + seed % 40))
    draw, things = ImageDraw.Draw(image), []
    for index, (name, color) in enumerate(zip(CLASSES, ("#dc1e1e", "#1e3cdc"), strict=True)):
        side = chance.randrange(25, 40)
        x, y = 80 * index + chance.randrange(39), chance.randrange(79)
        shape = draw.ellipse if name == "circle" else draw.rectangle
        shape([x, y, x + side - 1, y + side - 1], fill=color)
        things.append((name, x, y, side))
    return image, things


def scenes(
    folder: Path, count: int = 6, sub: str = "images", ending: str = "png", start: int = 0
) -> dict[str, list[Thing]]:
    """Write images `img_0.png` … under `folder / sub`; return the things of each by its name."""
    made = {}
    for index in range(count):
        image, things = scene(start + index)
        name = f"img_{index}.{ending}"
        put(folder / sub / name, image)
        made[name] = things
    return made


def put(path: Path, content: Image.Image | str | bytes | dict | list) -> Path:
    """Write an image, text, bytes, or anything else as JSON; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def coco(made: dict[str, list[Thing]], crowd: Collection[str] = ()) -> dict[str, Any]:
    """Return a sound COCO document of scenes; classes in `crowd` are marked as crowds."""
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": id, "name": name} for id, name in enumerate(CLASSES, start=1)],
    }
    for image_id, (file_name, things) in enumerate(made.items(), start=1):
        document["images"].append(
            {"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT}
        )
        for name, x, y, side in things:
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 1 + CLASSES.index(name),
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": int(name in crowd),
                    "segmentation": [square(x, y, side)],
                }
            )
    return document


def square(x: int, y: int, side: int) -> list[int]:
    """Return the outline of a thing's box, flat."""
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def yolo(things: Sequence[Thing], classes: Sequence[str] = CLASSES) -> str:
    """Return a label file of boxes."""
    return "".join(
        f"{classes.index(name)} {(x + side / 2) / WIDTH} {(y + side / 2) / HEIGHT} "
        f"{side / WIDTH} {side / HEIGHT}\n"
        for name, x, y, side in things
    )


@dataclass(frozen=True)
class Read:
    """What became of a dataset: its splits as given, every fault by kind, and all that is said."""

    splits: dict[str, Dataset]
    kinds: dict[str, int]
    said: str

    @property
    def train(self) -> Dataset:
        return self.splits["train"]


def read(folder: Path, format: str = "auto", max_drop: float = 0.01, **decided: Any) -> Read:
    """Read a dataset as training would; raise UserError where training would refuse it.

    Args:
        decided: fields of ReadingConfig.
    """
    surveyed = survey(folder, format, ReadingConfig(**decided))
    surveyed.require_sound(max_drop)
    # made splits and advice as well, so that nothing of a real run is passed over
    splits = load_splits(folder, format=format, max_drop=max_drop, reading=ReadingConfig(**decided))
    kinds: dict[str, int] = {}
    for fault in (*surveyed.faults, *advise(make_splits(surveyed), folder, surveyed.faults)):
        kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
    texts = [str(fault) for fault in surveyed.faults if fault.action is not Action.REFUSED]
    return Read(surveyed.splits, kinds, "\n".join([*splits.notes, *texts]))


def survey_of(folder: Path, format: str = "auto", **decided: Any) -> Survey:
    return survey(folder, format, ReadingConfig(**decided))


def refusal(folder: Path, format: str = "auto", max_drop: float = 0.01, **decided: Any) -> str:
    """Return all that is said where a dataset is refused."""
    with pytest.raises(UserError) as caught:
        read(folder, format, max_drop, **decided)
    return "\n".join(caught.value.problems)


def things_of(dataset: Dataset) -> dict[str, list[Thing]]:
    """Return the objects of each image by the file's name, with whole pixels, as scenes have them.

    The side is the box's width; boxes must be square to the pixel, as all things are.
    """
    names = {category.id: category.name for category in dataset.categories}
    found: dict[str, list[Thing]] = {}
    for image in dataset.images:
        things = []
        for annotation in dataset.annotations_by_image[image.id]:
            x, y, width, height = annotation.bbox_xywh
            assert round(width) == round(height)
            things.append((names[annotation.category_id], round(x), round(y), round(width)))
        found[image.path.name] = sorted(things)
    return found


def sorted_things(made: dict[str, list[Thing]]) -> dict[str, list[Thing]]:
    return {name: sorted(things) for name, things in made.items()}


def mask_iou(dataset: Dataset, made: dict[str, list[Thing]]) -> float:
    """Return the least IoU of any object's mask with the square of its thing."""
    worst = 1.0
    names = {category.id: category.name for category in dataset.categories}
    for image in dataset.images:
        for annotation in dataset.annotations_by_image[image.id]:
            assert annotation.segmentation is not None
            name = names[annotation.category_id]
            (x, y, side), *_ = [thing[1:] for thing in made[image.path.name] if thing[0] == name]
            truth = np.zeros((image.height, image.width), dtype=bool)
            truth[y : y + side, x : x + side] = True
            mask = coco_mask.decode(annotation.segmentation).astype(bool)
            worst = min(worst, float((mask & truth).sum() / (mask | truth).sum()))
    return worst
