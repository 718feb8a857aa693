"""Read truth and COCO results from any tool, and check them as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from app.datasets.coco import Dataset, Image, compress, examine
from app.datasets.geometry import is_absent, is_number, mask_fault
from app.errors import UserError
from app.files import read_json

SHOWN = 10  # problems


def read_truth(file: Path) -> Dataset:
    """Read a COCO JSON with objects to find; its images need not be there.

    Raises:
        UserError: with every problem of the file.
    """
    if not file.exists():
        raise UserError(f"--truth {file}: no such file (a COCO JSON with images and annotations)")
    return examine(file, None).sound()


def read_results(file: Path, truth: Dataset) -> list[dict[str, Any]]:
    """Read COCO results, with boxes and, where they have any, compressed masks.

    A missing box is taken from the mask. Of `truth`, ids and sizes of the images are needed.

    Raises:
        UserError: with the first problems, and how many there are.
    """
    if not file.exists():
        raise UserError(f"--predictions {file}: no such file (a JSON list of COCO results)")
    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(
            f"{file}: must be a JSON list of results: image_id, category_id, score, bbox or "
            "segmentation"
        )
    images = {image.id: image for image in truth.images}
    categories = {category.id for category in truth.categories}
    problems = [
        f"{file}: [{index}].{problem}"
        for index, entry in enumerate(content)
        if (problem := _problem(entry, images, categories))
    ]
    if problems:
        more = [f"{file}: and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError([*problems[:SHOWN], *more])
    return [_read(entry, images[entry["image_id"]]) for entry in content]


def _problem(entry: Any, images: Mapping[int, Image], categories: set[int]) -> str | None:
    if not isinstance(entry, dict):
        return f" is {entry!r:.60}: must be an object"
    image_id, category, score = (entry.get(k) for k in ("image_id", "category_id", "score"))
    if not isinstance(image_id, int) or image_id not in images:
        return f"image_id is {image_id!r:.60}: the truth lists no such image"
    if not isinstance(category, int) or category not in categories:
        return f"category_id is {category!r:.60}: the truth lists no such category"
    if not is_number(score):
        return f"score is {score!r:.60}: must be a finite number"
    box, mask = entry.get("bbox"), entry.get("segmentation")
    if is_absent(box) and is_absent(mask):
        return "bbox is missing, and so is segmentation: one of them must be there"
    if not is_absent(box) and not _is_box(box):
        return f"bbox is {box!r:.60}: must be four finite numbers x, y, width, height"
    if is_absent(mask):
        return None
    fault = mask_fault(mask, images[image_id].width, images[image_id].height)
    return f"segmentation is {mask!r:.60}: {fault[1]}" if fault else None


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0
    )


def _read(entry: Mapping[str, Any], image: Image) -> dict[str, Any]:
    mask = compress(entry.get("segmentation"), image.width, image.height)
    box = entry["bbox"] if not is_absent(entry.get("bbox")) else coco_mask.toBbox(mask).tolist()
    result = {key: entry[key] for key in ("image_id", "category_id", "score")} | {"bbox": box}
    return result if mask is None else result | {"segmentation": mask}
