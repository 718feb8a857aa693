"""Synthetic images of shapes with exact masks, to try things on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from app.config.schema import problems_of
from app.config.shapes import BACKGROUNDS, ShapesConfig, Thing
from app.datasets.synthetic.drawing import Mask, draw_image
from app.errors import UserError
from app.files import atomic_folder, write_json

GENERATOR = "sam3-finetuning shapes"
VERSION = 3  # count up when the same settings give other images
MOST_SEED = 2**63 - 1
COMPRESSION = 1  # of PNG, 0..9; higher ones cost more time than they save room


def make_shapes(
    output: Path, *, seed: int = 0, workers: int | None = None, **settings: Any
) -> None:
    """Write `output/train` and `output/valid`, each `_annotations.coco.json` and `images/*.png`.

    Byte-identical for the same settings and seed. Masks are a shape's visible pixels. Every class
    occurs in train; `valid=0` writes no valid split. A set made earlier at `output` is replaced.

    Args:
        workers: threads that draw, None for one a core; they change nothing but the time.
        settings: those of `ShapesConfig`.

    Raises:
        UserError: every setting that is out of range, or `output` holds something else.
    """
    config = check_shapes(settings, seed)
    if output.exists() and not is_shapes(output) and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output}: holds something other than a set of shapes; name a new folder")
    with atomic_folder(output) as folder, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        _write_split(folder / "train", config.train, config, [seed, 0], pool)
        if config.valid:
            _write_split(folder / "valid", config.valid, config, [seed, 1], pool)


def check_shapes(settings: Mapping[str, Any], seed: int) -> ShapesConfig:
    """Return the checked settings; raise UserError with every one that is out of range."""
    problems = []
    if not 0 <= seed <= MOST_SEED:
        problems.append(f"seed is {seed}: must be 0 to {MOST_SEED}")
    try:
        config = ShapesConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError([*problems_of(error), *problems]) from None
    if problems:
        raise UserError(problems)
    return config


def info(config: ShapesConfig, seed: int) -> dict[str, Any]:
    """Return the `info` of the COCO JSON: tells a set made by us, and with which settings."""
    return {"description": GENERATOR, "version": VERSION, **config.model_dump(), "seed": seed}


def is_shapes(folder: Path) -> bool:
    """Return whether `make_shapes`, of any version, wrote this folder."""
    path = folder / "train" / "_annotations.coco.json"
    return path.is_file() and GENERATOR in path.read_text("utf-8", "replace")


def _write_split(
    folder: Path, count: int, config: ShapesConfig, seed: list[int], pool: ThreadPoolExecutor
) -> None:
    (folder / "images").mkdir(parents=True)
    plan = _plan(count, config, np.random.default_rng(seed))
    ids = {name: id for id, name in enumerate(config.categories(), start=1)}

    def write(image_id: int) -> list[dict[str, Any]]:
        random = np.random.default_rng([*seed, image_id])  # its own: whichever thread draws it
        path = folder / _file_name(image_id)
        return _write_image(path, plan[image_id - 1], config, random)

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, masks in enumerate(pool.map(write, range(1, count + 1)), start=1):
        size = {"width": config.width, "height": config.height}
        images.append({"id": image_id, "file_name": _file_name(image_id), **size})
        for thing, mask in zip(plan[image_id - 1], masks, strict=True):
            for name in config.names(thing):
                keys = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name]}
                annotations.append({**keys, **mask})
    categories = [{"id": id, "name": name} for name, id in ids.items()]
    document = {"info": info(config, seed[0]), "images": images, "annotations": annotations}
    write_json(folder / "_annotations.coco.json", {**document, "categories": categories})


def _file_name(image_id: int) -> str:
    return f"images/{image_id:06d}.png"


def _plan(count: int, config: ShapesConfig, random: np.random.Generator) -> list[list[Thing]]:
    """Choose the things of each image; every class occurs where there is room."""
    drawn = config.things_by_class()
    names, most = list(drawn), config.max_shapes
    plan: list[list[Thing]] = []
    deck: list[int] = []  # classes still to be drawn before any is drawn again
    done = 0
    for left in range(count - 1, -1, -1):
        owed = min(len(names) - done - left * most, most)  # more than the images left can hold
        shapes = max(int(random.integers(config.min_shapes, most + 1)), owed)
        while len(deck) < shapes:
            deck += random.permutation(len(names)).tolist()
        chosen, deck = [drawn[names[index]] for index in deck[:shapes]], deck[shapes:]
        plan.append([things[random.integers(len(things))] for things in chosen])
        done += shapes
    return plan


def _write_image(
    path: Path, things: list[Thing], config: ShapesConfig, random: np.random.Generator
) -> list[dict[str, Any]]:
    """Draw and save one image; returns what COCO says of each thing's mask."""
    style = config.background
    if style == "mixed":
        style = BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    pixels, masks = draw_image(
        things,
        width=config.width,
        height=config.height,
        background=style,
        shun=config.colors or (),
        radius=(config.radius[0], config.radius[1]),
        turn=config.turn,
        random=random,
        fog=config.fog,
    )
    PILImage.fromarray(pixels).save(path, compress_level=COMPRESSION)
    return [describe(mask) for mask in masks]


def describe(mask: Mask) -> dict[str, Any]:
    """Return what COCO says of a mask."""
    rle = coco_mask.encode(np.asfortranarray(mask).view(np.uint8))
    return {
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }
