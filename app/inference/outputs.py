"""Write the files of an image's detections, by kind of output: `PER_IMAGE`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.datasets.rle import Rle, area, decode_crop
from app.errors import UserError
from app.files import atomic_folder, atomic_path, write_text
from app.inference.detections import Detections

if TYPE_CHECKING:
    from app.inference.polygons import Polygon

# Drawing and tracing need OpenCV and more. They are imported where they are used, so that a device
# that saves nothing of the kind does not need them.
MAX_ID = 65_535  # of 16 bits


@dataclass(frozen=True)
class Output:
    """Describe a kind of output with a file or folder for each image.

    Attributes:
        path: in the output folder; {} is the image's name. A path without a suffix is a folder.
        write: writes the file or folder.
    """

    path: str
    write: Callable[[Path, Image.Image, Detections], None]


def write_images(
    folder: Path, name: str, image: Image.Image, detections: Detections, save: Sequence[str]
) -> None:
    """Write the outputs of one image, of the kinds in `save`."""
    for kind in save:
        if kind in PER_IMAGE:
            PER_IMAGE[kind].write(folder / PER_IMAGE[kind].path.format(name), image, detections)


def draw_detections(image: Image.Image, detections: Detections) -> Image.Image:
    """Draw mask, box, prompt and score on a copy of the image."""
    from app.datasets.overlay import color_of, draw_objects

    labels = [
        f"{detections.prompts[prompt]} {score:.2f}"
        for prompt, score in zip(detections.prompt_ids, detections.scores, strict=True)
    ]
    colors = [color_of(int(prompt)) for prompt in detections.prompt_ids]
    return draw_objects(image, detections.boxes_xyxy, detections.masks, labels, colors)


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the COCO results of one image.

    Args:
        category_ids: the category of each prompt, in the order of `detections.prompts`.
    """
    results = []
    for index in range(len(detections)):
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[int(detections.prompt_ids[index])],
            "bbox": box_xywh(detections, index),
            "score": float(detections.scores[index]),
        }
        if detections.masks is not None:
            result["segmentation"] = detections.masks[index]
        results.append(result)
    return results


def box_xywh(detections: Detections, index: int) -> list[float]:
    """Return a detection's box in pixels."""
    x1, y1, x2, y2 = (float(side) for side in detections.boxes_xyxy[index])
    return [x1, y1, x2 - x1, y2 - y1]


def _write_overlay(path: Path, image: Image.Image, detections: Detections) -> None:
    _save(path, draw_detections(image, detections))


def _write_yolo(path: Path, _: Image.Image, detections: Detections) -> None:
    """Write labels as Ultralytics trains on them; classes count from 0, as the prompts do."""
    from app.inference.yolo_labels import label_line

    size = detections.width, detections.height
    lines = [
        label_line(int(prompt), _mask(detections, index), box_xywh(detections, index), *size)
        for index, prompt in enumerate(detections.prompt_ids)
    ]
    write_text(path, "".join(lines))


def _write_instances(path: Path, _: Image.Image, detections: Detections) -> None:
    """Write 16 bits a pixel: 0 is nothing, 1 the highest score, which lies on top."""
    _save(path, _painted("instances", detections, np.arange(1, len(detections) + 1)))


def _write_semantic(path: Path, _: Image.Image, detections: Detections) -> None:
    """Write 16 bits a pixel: the prompt's number in legend.json, the highest score on top."""
    _save(path, _painted("semantic", detections, detections.prompt_ids + 1))


def _painted(kind: str, detections: Detections, ids: NDArray[np.int64]) -> Image.Image:
    """Return a picture of 16 bits a pixel that holds `ids` (N,) where the N masks are."""
    if ids.max(initial=0) > MAX_ID:
        raise UserError(
            f"--save {kind}: {ids.max()} of them do not fit the 16 bits of a PNG ({MAX_ID}); "
            "lower --max-detections, or save coco"
        )
    canvas = np.zeros((detections.height, detections.width), dtype=np.uint16)
    for id, mask in zip(ids[::-1], reversed(_masks(kind, detections)), strict=True):
        inside, left, top = decode_crop(mask)
        canvas[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = id
    return Image.fromarray(canvas)


def _write_cutouts(folder: Path, image: Image.Image, detections: Detections) -> None:
    """Write a PNG of each object, as large as its mask, which is the alpha channel.

    The name tells the place of its upper left corner: number_prompt_x_y.
    """
    pixels = np.array(image)
    with atomic_folder(folder) as temporary:
        for index, mask in enumerate(_masks("cutouts", detections)):
            inside, left, top = decode_crop(mask)
            if not inside.size:
                continue
            window = pixels[top : top + inside.shape[0], left : left + inside.shape[1]]
            prompt = _slug(detections.prompts[int(detections.prompt_ids[index])])
            cut = Image.fromarray(np.dstack([window, inside.astype(np.uint8) * 255]))
            cut.save(temporary / f"{index + 1:03d}_{prompt}_{left}_{top}.png")


def foreign_cutouts(folder: Path) -> list[str]:
    """Return the names in an image's folder of cutouts that `_write_cutouts` cannot have given."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return [path.name for path in inside if not re.fullmatch(r"\d{3,}_.*_\d+_\d+\.png", path.name)]


def _write_geojson(path: Path, _: Image.Image, detections: Detections) -> None:
    write_text(path, json.dumps(feature_collection(detections), allow_nan=False) + "\n")


def feature_collection(detections: Detections) -> dict[str, Any]:
    """Return GeoJSON in pixels of the image, y downwards; a box where there is no mask."""
    features = [
        {
            "type": "Feature",
            "id": index + 1,
            "properties": {
                "prompt": detections.prompts[int(prompt)],
                "category_id": int(prompt) + 1,
                "score": float(detections.scores[index]),
            },
            "geometry": {"type": "MultiPolygon", "coordinates": _outlines(detections, index)},
        }
        for index, prompt in enumerate(detections.prompt_ids)
    ]
    size = {"width": detections.width, "height": detections.height}
    return {"type": "FeatureCollection", "image": size, "features": features}


def _outlines(detections: Detections, index: int) -> list[Polygon] | list[list[list[list[float]]]]:
    if mask := _mask(detections, index):
        from app.inference.polygons import polygons

        return polygons(mask)
    x1, y1, x2, y2 = (float(side) for side in detections.boxes_xyxy[index])
    return [[[[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]]]]


def _mask(detections: Detections, index: int) -> Rle | None:
    """Return a detection's mask; None where there is none, or it covers no pixel."""
    mask = detections.masks[index] if detections.masks is not None else None
    return mask if mask is not None and area(mask) else None


def _masks(kind: str, detections: Detections) -> list[Rle]:
    """Return all masks; raise UserError without a mask head."""
    if detections.masks is None:
        raise UserError(f"--save {kind}: these weights have no mask head; save coco, csv or yolo")
    return detections.masks


def _slug(prompt: str) -> str:
    """Return a prompt as part of a file's name, in any file system."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40]


def _save(path: Path, picture: Image.Image) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary)


PER_IMAGE = {
    "overlay": Output("{}.png", _write_overlay),
    "yolo": Output("labels/{}.txt", _write_yolo),
    "instances": Output("instances/{}.png", _write_instances),
    "semantic": Output("semantic/{}.png", _write_semantic),
    "cutouts": Output("cutouts/{}", _write_cutouts),
    "geojson": Output("geojson/{}.geojson", _write_geojson),
}
