"""Drawn films of shapes that move, cross, leave and come back, with exact masks and identities.

A set is COCO-VID: COCO's images and annotations, with `videos`, each image's `video_id` and
`frame_id`, and each annotation's `track_id`; so that whatever reads COCO reads its frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.config.shapes import BACKGROUNDS, Thing
from app.datasets.synthetic import drawing
from app.datasets.synthetic.drawing import Mask, Pixels, Shape
from app.datasets.synthetic.shapes import COMPRESSION, describe
from app.errors import UserError
from app.files import atomic_folder, write_json

GENERATOR = "sam3-finetuning films"
VERSION = 1  # count up when the same settings give other films
ANNOTATIONS = "_annotations.coco.json"
LEAST_PIXELS, LEAST_SHARE = 16, 0.25  # of a shape that is labelled: no one labels slivers
SECONDS = (6.0, 12.0)  # of a way there and back
REACH = (0.2, 0.75)  # of the film's side: beyond a half a shape leaves the picture
GROWTH = 0.25  # most, of the radius, either way
TURN = math.radians(15)  # most, either way: what the carried nano knows
KINDS = ("circle", "rectangle", "triangle", "cross", "hexagon")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")


@dataclass(frozen=True)
class Way:
    """How a shape goes: there and back along each axis, each in its own time.

    Attributes:
        center, reach: x and y in pixels.
        seconds, phase: of each axis, of its size and of its turn; phases in radians.
        growth: of the radius, either way, 0..1.
        turn: either way, radians.
    """

    shape: Shape
    center: tuple[float, float]
    reach: tuple[float, float]
    seconds: tuple[float, float, float, float]
    phase: tuple[float, float, float, float]
    growth: float
    turn: float

    def at(self, time: float) -> Shape:
        """Return the shape at a time in seconds."""
        x, y, size, turn = (
            math.sin(2 * math.pi * time / seconds + phase)
            for seconds, phase in zip(self.seconds, self.phase, strict=True)
        )
        return replace(
            self.shape,
            x=self.center[0] + self.reach[0] * x,
            y=self.center[1] + self.reach[1] * y,
            radius=self.shape.radius * (1 + self.growth * size),
            turn=self.turn * turn,
        )


@dataclass(frozen=True)
class Film:
    """A drawn film: its things, how they go, and what they are drawn on."""

    things: tuple[Thing, ...]
    ways: tuple[Way, ...]
    colors: tuple[NDArray[np.int64], ...]
    background: Pixels

    def frame(self, time: float) -> tuple[Pixels, list[Mask]]:
        """Return the picture at a time, and the visible pixels of each thing, later ones on top."""
        height, width = self.background.shape[:2]
        pixels = self.background.copy()
        top = np.zeros((height, width), np.uint8)
        for number, (way, color) in enumerate(zip(self.ways, self.colors, strict=True), start=1):
            covered = _cover(way.at(time), width, height)
            pixels[covered] = color
            top[covered] = number
        return pixels, [top == number for number in range(1, len(self.things) + 1)]


def draw_film(
    seed: int | tuple[int, ...],
    *,
    width: int = 320,
    height: int = 240,
    things: tuple[int, int] = (2, 5),
) -> Film:
    """Draw the plan of a film; the same for the same arguments.

    Args:
        width, height: pixels.
        things: least and most; no two look the same.
    """
    random = np.random.default_rng(seed)
    count = int(random.integers(things[0], things[1] + 1))
    looks = [(kind, color) for kind in KINDS for color in COLORS]
    chosen = [Thing(*looks[i]) for i in random.choice(len(looks), count, replace=False)]
    colors = drawing.shape_colors(chosen, random)
    style = BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    others = [*colors, *(np.array(drawing.COLORS[name]) for name in COLORS)]
    background = drawing.paint_background(style, width, height, others, random)
    side = min(width, height)
    ways = []
    for thing in chosen:
        ratio = random.uniform(*drawing.RATIOS.get(thing.kind, (1, 1)))
        radius = side * random.uniform(0.12, 0.24)
        ways.append(
            Way(
                Shape(thing.kind, 0, 0, radius, 0, ratio),
                (width * random.uniform(0.35, 0.65), height * random.uniform(0.35, 0.65)),
                (width * random.uniform(*REACH), height * random.uniform(*REACH) / 2),
                tuple(random.uniform(*SECONDS, 4)),
                tuple(random.uniform(0, 2 * math.pi, 4)),
                random.uniform(0, GROWTH),
                random.uniform(0, TURN),
            )
        )
    return Film(tuple(chosen), tuple(ways), tuple(colors), background)


def make_films(
    output: Path,
    *,
    films: int = 20,
    frames: int = 100,
    fps: float = 20.0,
    width: int = 320,
    height: int = 240,
    label_by: str = "kind",
    seed: int = 0,
) -> None:
    """Write `output/_annotations.coco.json` and a folder of PNG frames for each film.

    Byte-identical for the same arguments.

    Args:
        fps: frames a second.
        label_by: kind ("circle") or both ("red circle").

    Raises:
        UserError: `output` holds something else, or an argument is out of range.
    """
    ranges = {"films": (films, 1, 1000), "frames": (frames, 1, 100_000)}
    ranges |= {"width": (width, 32, 8192), "height": (height, 32, 8192)}
    problems = [
        f"{name} is {value}: must be {low} to {high}"
        for name, (value, low, high) in ranges.items()
        if not low <= value <= high
    ]
    if label_by not in ("kind", "both"):
        problems.append(f"label_by is '{label_by}': must be kind or both")
    if problems:
        raise UserError(problems)
    if output.exists() and not is_films(output) and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output}: holds something other than drawn films; name a new folder")
    names = list(KINDS) if label_by == "kind" else [f"{c} {k}" for c in COLORS for k in KINDS]
    ids = {name: id for id, name in enumerate(names, start=1)}
    videos: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with atomic_folder(output) as folder:
        for number in range(1, films + 1):
            film, name = draw_film((seed, number), width=width, height=height), f"{number:04d}"
            (folder / name).mkdir()
            size = {"width": width, "height": height}
            videos.append({"id": number, "name": name, **size, "fps": fps, "length": frames})
            for frame in range(frames):
                pixels, masks = film.frame(frame / fps)
                file = f"{name}/{frame:06d}.png"
                Image.fromarray(pixels).save(folder / file, compress_level=COMPRESSION)
                image = len(images) + 1
                keys = {"video_id": number, "frame_id": frame}
                images.append({"id": image, "file_name": file, **size, **keys})
                for thing, entry in _labels(film, masks, frame / fps):
                    called = film.things[thing]
                    label = called.kind if label_by == "kind" else f"{called.color} {called.kind}"
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": image,
                            "video_id": number,
                            "category_id": ids[label],
                            "track_id": 100 * number + thing,
                            **entry,
                        }
                    )
        categories = [{"id": id, "name": name} for name, id in ids.items()]
        document = {
            "info": {"description": GENERATOR, "version": VERSION, "seed": seed},
            "videos": videos,
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        write_json(folder / ANNOTATIONS, document)


def is_films(folder: Path) -> bool:
    """Return whether `make_films`, of any version, wrote this folder."""
    path = folder / ANNOTATIONS
    return path.is_file() and GENERATOR in path.read_text("utf-8", "replace")[:200]


def _labels(film: Film, masks: list[Mask], time: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what COCO says of each thing that is seen well enough."""
    for number, (way, mask) in enumerate(zip(film.ways, masks, strict=True)):
        visible = int(mask.sum())
        if visible >= LEAST_PIXELS and visible >= LEAST_SHARE * way.at(time).stamp()[2].sum():
            yield number, describe(mask)


def _cover(shape: Shape, width: int, height: int) -> Mask:
    """Return the pixels of the picture that a shape covers, wherever it is."""
    covered = np.zeros((height, width), bool)
    if not -shape.radius < shape.x < width + shape.radius:
        return covered
    if not -shape.radius < shape.y < height + shape.radius:
        return covered
    rows, columns, mask = shape.stamp()
    top, left = max(rows.start, 0), max(columns.start, 0)
    bottom, right = min(rows.stop, height), min(columns.stop, width)
    if top < bottom and left < right:
        covered[top:bottom, left:right] = mask[
            top - rows.start : bottom - rows.start, left - columns.start : right - columns.start
        ]
    return covered
