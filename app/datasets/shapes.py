"""Synthetic images of circles, rectangles and triangles with exact masks, to try things on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from app.errors import UserError
from app.files import atomic_folder, write_json

KINDS = ("circle", "rectangle", "triangle")  # category ids 1, 2, 3
GENERATOR = "sam3-finetuning shapes"
VERSION = 1  # count up when the same settings give other images
MIN_VISIBLE = 0.5  # of a shape's own area, once later shapes lie on it
RADIUS = (0.06, 0.18)  # of the image's shorter side
MIN_RADIUS = 4  # pixels; below it a turned shape may cover none
PLACEMENTS = 200  # tries a shape before the image is begun anew

Mask = NDArray[np.bool_]  # (height, width)


@dataclass(frozen=True)
class ShapesConfig:
    """What to draw: images a split, pixels, shapes an image (both ends included)."""

    train: int = 20
    valid: int = 5
    width: int = 640
    height: int = 480
    min_shapes: int = 2
    max_shapes: int = 5
    seed: int = 0

    def check(self) -> None:
        """Raises UserError with every setting that is out of range."""
        most = self.max_shapes
        ranges = {
            "train": (1, 100_000),
            "valid": (0, 100_000),
            "width": (32, 8192),
            "height": (32, 8192),
            "min_shapes": (1, most),
            "max_shapes": (1, 12),
            "seed": (0, 2**63 - 1),
        }
        problems = [
            f"shapes: {key} is {getattr(self, key)}: must be {low} to {high}"
            for key, (low, high) in ranges.items()
            if not low <= getattr(self, key) <= high
        ]
        if self.train * most < len(KINDS):
            problems.append(
                f"shapes: {self.train} training images of at most {most} shapes cannot hold each "
                f"of {', '.join(KINDS)}; raise train or max_shapes"
            )
        if problems:
            raise UserError(problems)

    def info(self) -> dict[str, Any]:
        """The `info` of the COCO JSON: tells a set made by us, and with which settings."""
        return {"description": GENERATOR, "version": VERSION, **asdict(self)}


def make_shapes(
    output: Path,
    *,
    train: int = 20,
    valid: int = 5,
    width: int = 640,
    height: int = 480,
    min_shapes: int = 2,
    max_shapes: int = 5,
    seed: int = 0,
) -> None:
    """Write `output/train` and `output/valid`, each `_annotations.coco.json` and `images/*.png`.

    Byte-identical for the same settings. Masks are a shape's visible pixels. Every class occurs in
    train; `valid=0` writes no valid split. A set made earlier at `output` is replaced.

    Raises:
        UserError: a setting out of range, or `output` holds something else.
    """
    config = ShapesConfig(train, valid, width, height, min_shapes, max_shapes, seed)
    config.check()
    if output.exists() and not is_shapes(output) and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output}: holds something other than a set of shapes; name a new folder")
    with atomic_folder(output) as folder:
        _write_split(folder / "train", train, config, np.random.default_rng([seed, 0]))
        if valid:
            _write_split(folder / "valid", valid, config, np.random.default_rng([seed, 1]))


def is_shapes(folder: Path) -> bool:
    """Whether `make_shapes`, of any version, wrote this folder."""
    path = folder / "train" / "_annotations.coco.json"
    return path.is_file() and GENERATOR in path.read_text("utf-8", "replace")


def _write_split(
    folder: Path, count: int, config: ShapesConfig, random: np.random.Generator
) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    deck: list[int] = []  # kinds still to be drawn before any is drawn again
    for image_id in range(1, count + 1):
        shapes = int(random.integers(config.min_shapes, config.max_shapes + 1))
        if image_id == 1:  # so that a small split has every class
            shapes = max(shapes, min(len(KINDS), config.max_shapes))
        while len(deck) < shapes:
            deck += random.permutation(len(KINDS)).tolist()
        kinds, deck = deck[:shapes], deck[shapes:]
        pixels, masks = _draw_image(kinds, config, random)
        name = f"images/{image_id:06d}.png"
        PILImage.fromarray(pixels).save(folder / name)
        size = {"width": config.width, "height": config.height}
        images.append({"id": image_id, "file_name": name, **size})
        for kind, mask in zip(kinds, masks, strict=True):
            annotations.append(_annotation(len(annotations) + 1, image_id, kind + 1, mask))
    categories = [{"id": id, "name": name} for id, name in enumerate(KINDS, start=1)]
    document = {"info": config.info(), "images": images, "annotations": annotations}
    write_json(folder / "_annotations.coco.json", {**document, "categories": categories})


def _annotation(id: int, image_id: int, category_id: int, mask: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }


def _draw_image(
    kinds: list[int], config: ShapesConfig, random: np.random.Generator
) -> tuple[NDArray[np.uint8], list[Mask]]:
    """One image (height, width, RGB), and the visible pixels of each shape, in order of `kinds`."""
    masks = None
    while masks is None:
        masks = _place_shapes(kinds, config, random)
    background, *colours = _distinct_colours(len(kinds) + 1, random)
    spread = int(random.choice([0, 20]))  # plain or noisy; colours stay further apart than this
    noise = random.integers(-spread, spread + 1, (config.height, config.width, 3))
    pixels = np.clip(background + noise, 0, 255).astype(np.uint8)
    for mask, colour in zip(masks, colours, strict=True):
        pixels[mask] = colour
    return pixels, masks


def _place_shapes(
    kinds: list[int], config: ShapesConfig, random: np.random.Generator
) -> list[Mask] | None:
    """Visible masks, each shape over those before it; None where one found no room."""
    visible: list[Mask] = []
    least: list[float] = []  # pixels that must stay visible of each
    for kind in kinds:
        for _ in range(PLACEMENTS):
            shape = _random_shape(kind, config, random)
            remaining = [mask & ~shape for mask in visible]
            if all(m.sum() >= pixels for m, pixels in zip(remaining, least, strict=True)):
                visible = [*remaining, shape]
                least.append(MIN_VISIBLE * shape.sum())
                break
        else:
            return None
    return visible


def _random_shape(kind: int, config: ShapesConfig, random: np.random.Generator) -> Mask:
    """A shape of random size, place and turn, wholly inside the image."""
    low, high = (share * min(config.width, config.height) for share in RADIUS)
    radius = random.uniform(max(low, MIN_RADIUS), high)
    centre_x = random.uniform(radius, config.width - 1 - radius)
    centre_y = random.uniform(radius, config.height - 1 - radius)
    y, x = np.ogrid[: config.height, : config.width]
    x, y = x - centre_x, y - centre_y
    if KINDS[kind] == "circle":
        return x**2 + y**2 <= radius**2
    turn = random.uniform(0, 2 * np.pi)
    if KINDS[kind] == "triangle":  # equilateral: three half-planes at the inner radius
        normals = turn + np.arange(3) * 2 * np.pi / 3
        return np.logical_and.reduce(
            [x * np.cos(normal) + y * np.sin(normal) <= radius / 2 for normal in normals]
        )
    corner = random.uniform(0.5, 1.0)  # radians from the long side to the diagonal
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    return (abs(along) <= radius * np.cos(corner)) & (abs(across) <= radius * np.sin(corner))


def _distinct_colours(count: int, random: np.random.Generator) -> list[NDArray[np.int64]]:
    """RGB colours, each 40 or more from every other in some channel."""
    colours: list[NDArray[np.int64]] = []
    while len(colours) < count:
        colour = random.integers(0, 256, 3)
        if all(abs(colour - other).max() >= 40 for other in colours):
            colours.append(colour)
    return colours
