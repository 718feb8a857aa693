"""Synthetic images of shapes with exact masks, to try things on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from app.config.schema import Background, ColorName, LabelBy, ShapeKind
from app.datasets.synthetic.drawing import COLORS, KINDS, Mask, Thing, draw_image
from app.errors import UserError, nearest
from app.files import atomic_folder, write_json

GENERATOR = "sam3-finetuning shapes"
VERSION = 3  # count up when the same settings give other images
MOST_RADIUS = 0.45  # of the image's shorter side
COMPRESSION = 1  # of PNG, 0..9; higher ones cost more time than they save room


@dataclass(frozen=True)
class ShapesConfig:
    """What to draw, and what to call it.

    Attributes:
        train, valid: images.
        width, height: pixels.
        min_shapes, max_shapes: an image, both ends included.
        radius: least and most, of the image's shorter side.
        turn: degrees, most, either way.
        seed: the same settings and seed give the same bytes.
        kinds: shapes to draw.
        colors: named colors to draw them in; None for any color.
        label_by: a category is a kind ("circle"), a color ("red thing") or both ("red circle");
            with "all" each shape is labelled three times, once for each of these.
        exclude: pairs never drawn, as "red circle".
        background: its style, or mixed: each image takes one.
    """

    train: int = 20
    valid: int = 5
    width: int = 640
    height: int = 480
    min_shapes: int = 2
    max_shapes: int = 5
    radius: Sequence[float] = (0.08, 0.25)
    turn: float = 15.0
    seed: int = 0
    kinds: Sequence[ShapeKind] = ("circle", "rectangle", "triangle")
    colors: Sequence[ColorName] | None = None
    label_by: LabelBy = "kind"
    exclude: Sequence[str] = ()
    background: Background = "mixed"

    def check(self) -> None:
        """Raises UserError with every setting that is out of range."""
        problems = [*self._check_numbers(), *self._check_names()]
        if not problems:
            problems = self._check_classes()
        if problems:
            raise UserError(problems)

    def _check_numbers(self) -> list[str]:
        ranges = {
            "train": (1, 100_000),
            "valid": (0, 100_000),
            "width": (32, 8192),
            "height": (32, 8192),
            "min_shapes": (1, self.max_shapes),
            "max_shapes": (1, 12),
            "seed": (0, 2**63 - 1),
            "turn": (0, 180),
        }
        problems = [
            f"shapes: {key} is {getattr(self, key)}: must be {low} to {high}"
            for key, (low, high) in ranges.items()
            if not low <= getattr(self, key) <= high
        ]
        if len(self.radius) != 2 or not 0 < self.radius[0] <= self.radius[1] <= MOST_RADIUS:
            radius = list(self.radius)
            problems.append(
                f"shapes: radius is {radius}: must be least and most, above 0, up to {MOST_RADIUS}"
            )
        return problems

    def _check_names(self) -> list[str]:
        problems = _check_list("kinds", self.kinds, KINDS)
        if self.colors is not None:
            problems += _check_list("colors", self.colors, tuple(COLORS))
        for key, known in (("label_by", get_args(LabelBy)), ("background", get_args(Background))):
            if (value := getattr(self, key)) not in known:
                problems.append(
                    f"shapes: {key} is '{value}': must be one of {', '.join(known)}."
                    f"{nearest(value, known)}"
                )
        if self.colors is None and self.label_by != "kind" and self.label_by in get_args(LabelBy):
            problems.append(f"shapes: label_by is {self.label_by}: needs colors, which names none")
        pairs = [f"{color} {kind}" for color in self.colors or () for kind in self.kinds]
        problems += [
            f"shapes: exclude names '{pair}': no such color and kind.{nearest(pair, pairs)}"
            for pair in self.exclude
            if pair not in pairs
        ]
        return problems

    def _check_classes(self) -> list[str]:
        drawn, room = list(self.drawn()), self.train * self.max_shapes
        if not drawn:
            return ["shapes: exclude leaves nothing to draw; take a pair from it"]
        if room < len(drawn):
            return [
                f"shapes: {self.train} training images of at most {self.max_shapes} shapes cannot "
                f"hold each of {', '.join(drawn)}; raise train or max_shapes"
            ]
        return []

    def things(self) -> list[Thing]:
        """Every kind in every color, without the pairs that are left out."""
        pairs = [Thing(kind, color) for kind in self.kinds for color in self.colors or (None,)]
        return [thing for thing in pairs if f"{thing.color} {thing.kind}" not in self.exclude]

    def names(self, thing: Thing) -> tuple[str, ...]:
        """The categories that a thing is labelled with."""
        names = {
            "kind": thing.kind,
            "color": f"{thing.color} thing",
            "both": f"{thing.color} {thing.kind}",
        }
        return tuple(names.values()) if self.label_by == "all" else (names[self.label_by],)

    def categories(self) -> list[str]:
        """Names in the order of their ids; 1 is the first."""
        return list(dict.fromkeys(name for t in self.things() for name in self.names(t)))

    def drawn(self) -> dict[str, list[Thing]]:
        """What may be drawn for each category; of three for a thing, for the narrowest."""
        grouped: dict[str, list[Thing]] = {}
        for thing in self.things():
            grouped.setdefault(self.names(thing)[-1], []).append(thing)
        return grouped

    def info(self) -> dict[str, Any]:
        """The `info` of the COCO JSON: tells a set made by us, and with which settings."""
        settings = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {"description": GENERATOR, "version": VERSION, **settings}


def _check_list(key: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    problems = [
        f"shapes: {key} names '{name}': there are {', '.join(known)}.{nearest(name, known)}"
        for name in names
        if name not in known
    ]
    if not names:
        problems.append(f"shapes: {key} is empty: name one or more of {', '.join(known)}")
    if len(set(names)) < len(names):
        problems.append(f"shapes: {key} names one twice: {', '.join(names)}")
    return problems


def make_shapes(output: Path, *, workers: int | None = None, **settings: Any) -> None:
    """Write `output/train` and `output/valid`, each `_annotations.coco.json` and `images/*.png`.

    Byte-identical for the same settings. Masks are a shape's visible pixels. Every class occurs in
    train; `valid=0` writes no valid split. A set made earlier at `output` is replaced.

    Args:
        workers: threads that draw, None for one a core; they change nothing but the time.
        settings: those of `ShapesConfig`.

    Raises:
        UserError: a setting out of range, or `output` holds something else.
    """
    config = ShapesConfig(**settings)
    config.check()
    if output.exists() and not is_shapes(output) and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output}: holds something other than a set of shapes; name a new folder")
    with atomic_folder(output) as folder, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        _write_split(folder / "train", config.train, config, [config.seed, 0], pool)
        if config.valid:
            _write_split(folder / "valid", config.valid, config, [config.seed, 1], pool)


def is_shapes(folder: Path) -> bool:
    """Whether `make_shapes`, of any version, wrote this folder."""
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
    document = {"info": config.info(), "images": images, "annotations": annotations}
    write_json(folder / "_annotations.coco.json", {**document, "categories": categories})


def _file_name(image_id: int) -> str:
    return f"images/{image_id:06d}.png"


def _plan(count: int, config: ShapesConfig, random: np.random.Generator) -> list[list[Thing]]:
    """The things of each image; every class occurs where there is room."""
    drawn = config.drawn()
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
    styles = [style for style in get_args(Background) if style != "mixed"]
    style = config.background
    if style == "mixed":
        style = styles[random.integers(len(styles))]
    pixels, masks = draw_image(
        things,
        width=config.width,
        height=config.height,
        background=style,
        shun=config.colors or (),
        radius=(config.radius[0], config.radius[1]),
        turn=config.turn,
        random=random,
    )
    PILImage.fromarray(pixels).save(path, compress_level=COMPRESSION)
    return [_describe(mask) for mask in masks]


def _describe(mask: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask).view(np.uint8))
    return {
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }
