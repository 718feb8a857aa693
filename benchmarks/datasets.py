"""How long does a dataset take to make, and to check? Exits 1 where a goal is missed.

    .venv/bin/python -m benchmarks.datasets shapes
    .venv/bin/python -m benchmarks.datasets check
    .venv/bin/python -m benchmarks.datasets decode

The goals are for 1,000 images of 640 x 480 drawn, and for 5,000 of them with 100,000 polygons
checked, on 2 cores; and for a photograph of 640 x 640 decoded and resized to 1008 on one. The
check's memory must not grow with the images.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from app.datasets.build import decode, survey
from app.datasets.dataset_report import render
from app.datasets.faults import MAX_DROP
from app.datasets.images import open_image
from app.datasets.square import to_square
from app.datasets.synthetic.shapes import make_shapes

GOAL = 10  # seconds for IMAGES
IMAGES = 1000
CHECK_GOAL = 60  # seconds for CHECK_IMAGES
CHECK_IMAGES = 5000
ANNOTATIONS = 100_000
GROWTH = 1.05  # most memory of all images to that of half of them, annotations being as many
WIDTH, HEIGHT = 640, 480
DECODE_GOAL = 6  # ms an image and core
LEVELS_GOAL = 1  # grey levels between our resize and that of upstream's processor
SIDE = 1008
POTHOLES = Path(__file__).resolve().parents[2] / "shared" / "datasets" / "potholes"


def time_shapes(images: int, background: str, workers: int | None) -> float:
    """Return the seconds to draw and write `images` of 640 x 480, with every option in use."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        make_shapes(
            Path(folder) / "set",
            workers=workers,
            train=images,
            valid=0,
            background=background,
            kinds=("circle", "rectangle", "triangle", "ellipse", "star", "ring", "cross"),
            colors=("red", "green", "blue", "yellow"),
            label_by="both",
        )
        return time.monotonic() - begun


def measure_check(images: int, annotations: int) -> tuple[float, float, float]:
    """Return the seconds to check a dataset, its peak MB, and that of half of its images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(_write_image, folder), range(images)))
        _write_labels(folder, images // 2, annotations)
        _, half = _in_child(folder)
        _write_labels(folder, images, annotations)
        seconds, whole = _in_child(folder)
    return seconds, whole, half


def _write_image(folder: Path, index: int) -> None:
    """Write a unique JPEG with as much detail as a photograph's."""
    random = np.random.default_rng(index)
    small = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture = small.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    picture.save(folder / f"{index:06d}.jpg", quality=85)


def _write_labels(folder: Path, images: int, annotations: int) -> None:
    random = np.random.default_rng(0)
    size = {"width": WIDTH, "height": HEIGHT}
    turns = np.arange(20) * 2 * math.pi / 20
    document: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i:06d}.jpg", **size} for i in range(images)],
        "annotations": [],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(10)],
    }
    for index in range(annotations):
        radius = random.uniform(5, 60)
        x, y = random.uniform(60, WIDTH - 60), random.uniform(60, HEIGHT - 60)
        points = np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], axis=1)
        document["annotations"].append(
            {
                "id": index + 1,
                "image_id": index % images,
                "category_id": index % 10,
                "bbox": [x - radius, y - radius, 2 * radius, 2 * radius],
                "area": math.pi * radius**2,
                "iscrowd": 0,
                "segmentation": [points.round(2).ravel().tolist()],
            }
        )
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def _in_child(folder: Path) -> tuple[float, float]:
    """Return the seconds and peak MB of a check in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_check, (folder,))


def _check(folder: Path) -> tuple[float, float]:
    begun = time.monotonic()
    found = decode(survey(folder), folder, lambda _: None)
    render(str(folder), found.splits, found.faults)
    found.require_sound(MAX_DROP)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.monotonic() - begun, megabytes


def run_shapes(images: int, background: str, workers: int | None) -> bool:
    seconds = time_shapes(images, background, workers)
    goal = GOAL * images / IMAGES
    print(f"shapes: {images} images of 640x480 in {seconds:.1f} s (goal {goal:g} s)")
    return seconds <= goal


def run_check(images: int) -> bool:
    annotations = ANNOTATIONS * images // CHECK_IMAGES
    seconds, whole, half = measure_check(images, annotations)
    goal = CHECK_GOAL * images / CHECK_IMAGES
    print(
        f"check: {images} images of 640x480, {annotations} annotations in {seconds:.1f} s "
        f"(goal {goal:g} s), {whole:.0f} MB; {half:.0f} MB for half the images "
        f"(goal: at most {GROWTH:g} times that)"
    )
    return seconds <= goal and whole <= half * GROWTH


def run_decode() -> bool:
    """Time decoding of photographs in one thread; process time, so that others do not count."""
    paths = sorted(POTHOLES.glob("*/*.jpg"))[:60]
    if not paths:
        print(f"decode: skipped, {POTHOLES} is not there")
        return True
    torch.set_num_threads(1)
    ours = min(_milliseconds(lambda path: to_square(open_image(path), SIDE), paths))
    pillow = min(_milliseconds(_decode_by_pillow, paths))
    levels = max(_distance_to_processor(open_image(path)) for path in paths[:10])
    print(
        f"decode and resize to {SIDE}: {ours:.2f} ms an image and core (goal {DECODE_GOAL} ms), "
        f"Pillow alone {pillow:.2f} ms; {levels} grey levels from upstream's processor "
        f"(goal {LEVELS_GOAL})"
    )
    return ours <= DECODE_GOAL and levels <= LEVELS_GOAL


def _milliseconds(work: Callable[[Path], object], paths: list[Path]) -> Iterator[float]:
    for _ in range(9):
        begun = time.process_time()
        for path in paths:
            work(path)
        yield 1000 * (time.process_time() - begun) / len(paths)


def _decode_by_pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _distance_to_processor(image: Image.Image) -> int:
    """Compare with upstream's own transform, up to where it turns to floats.

    See sam3_image_processor.py.
    """
    upstream = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.uint8, scale=True), v2.Resize(size=(SIDE, SIDE))]
    )
    return int((to_square(image, SIDE).int() - upstream(image).int()).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["shapes", "check", "decode"], default="shapes")
    parser.add_argument("--images", type=int, help=f"{IMAGES} to draw, {CHECK_IMAGES} to check")
    parser.add_argument("--background", default="mixed", help="of shapes")
    parser.add_argument("--workers", type=int, help="threads that draw; one a core if not given")
    arguments = parser.parse_args()
    if arguments.what == "check":
        return 0 if run_check(arguments.images or CHECK_IMAGES) else 1
    if arguments.what == "decode":
        return 0 if run_decode() else 1
    images = arguments.images or IMAGES
    return 0 if run_shapes(images, arguments.background, arguments.workers) else 1


if __name__ == "__main__":
    sys.exit(main())
