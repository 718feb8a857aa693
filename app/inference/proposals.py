"""Proposals in the forms of labelling tools, where a person corrects them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from app.config.schema import ProposalForm
from app.datasets import coco
from app.datasets.coco import Annotation, Dataset, Image
from app.datasets.rle import decode
from app.files import write_json, write_text
from app.inference.polygons import polygons

OPENED = {
    "labelme": "labelme {folder}/images, or X-AnyLabeling's Open Dir",
    "label-studio": "in a new project {folder}/labels.xml as its labelling interface, a local "
    "storage of {folder} (LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true, "
    "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={folder}), then import {folder}/tasks.json",
}
JSON = "_annotations.coco.json"
LONGEST = 1 << 16  # words of a chunk of a brush stroke
SIZES = (3, 4, 8, 16)  # bits of the four lengths that a chunk may have
LOCAL = "/data/local-files/?d="  # by which Label Studio names files below its document root


def rewrite(folder: Path, form: ProposalForm, weights: str) -> None:
    """Write a folder of COCO JSON and images in another form, in its place.

    Args:
        weights: that made the proposals, for whoever looks at them.
    """
    dataset = coco.examine(folder / JSON, None).sound()
    if form == "labelme":
        for image in dataset.images:
            write_json(image.path.with_suffix(".json"), labelme(dataset, image))
    else:
        tasks = [task(dataset, image, folder, weights) for image in dataset.images]
        write_json(folder / "tasks.json", tasks)
        write_text(folder / "labels.xml", label_config(dataset.class_names))
    (folder / JSON).unlink()


def labelme(dataset: Dataset, image: Image) -> dict[str, Any]:
    """Return LabelMe's JSON of an image: a polygon for each piece of a mask, else a rectangle.

    LabelMe's polygons have no holes; pieces of one object share its `group_id`.
    """
    names = {category.id: category.name for category in dataset.categories}
    shapes: list[dict[str, Any]] = []
    for number, each in enumerate(dataset.annotations_by_image[image.id], start=1):
        x, y, width, height = each.bbox_xywh
        rings: list[Any] = [[[x, y], [x + width, y + height]]]
        if each.segmentation is not None:
            rings = [polygon[0][:-1] for polygon in polygons(each.segmentation)]
        shapes += [
            {
                "label": names[each.category_id],
                "points": points,
                "group_id": number if len(rings) > 1 else None,
                "shape_type": "rectangle" if each.segmentation is None else "polygon",
                "flags": {},
                "description": f"proposal, score {each.score or 0.0:.3f}",
                "score": each.score,
            }
            for points in rings
        ]
    return {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": image.path.name,
        "imageData": None,
        "imageHeight": image.height,
        "imageWidth": image.width,
    }


def task(dataset: Dataset, image: Image, folder: Path, weights: str) -> dict[str, Any]:
    """Return Label Studio's task of an image, with its proposals as a prediction."""
    names = {category.id: category.name for category in dataset.categories}
    objects = dataset.annotations_by_image[image.id]
    place = PurePosixPath(image.path.relative_to(folder))
    found = [region(each, names[each.category_id], image.width, image.height) for each in objects]
    scores = [each.score or 0.0 for each in objects]
    prediction = {
        "model_version": weights,
        "score": float(np.mean(scores)) if scores else 0.0,
        "result": found,
    }
    return {"data": {"image": f"{LOCAL}{place}"}, "predictions": [prediction]}


def region(
    found: Annotation,
    label: str,
    width: int,
    height: int,
    *,
    kind: str = "",
    from_name: str = "",
    to_name: str = "image",
) -> dict[str, Any]:
    """Return a region of Label Studio, whose places are percents of the image's sides.

    Args:
        kind: rectanglelabels, polygonlabels or brushlabels; empty: a brush where there is a mask.
        from_name: of the control that has the label; empty: that of `label_config`.
    """
    has_mask = found.segmentation is not None
    kind = kind or ("brushlabels" if has_mask else "rectanglelabels")
    x, y, w, h = found.bbox_xywh
    value: dict[str, Any] = {kind: [label]}
    if kind == "brushlabels" and found.segmentation is not None:
        value |= {"format": "rle", "rle": brush_rle(decode(found.segmentation))}
    elif kind == "polygonlabels" and found.segmentation is not None:
        parts = [polygon[0][:-1] for polygon in polygons(found.segmentation)]
        points = max(parts, key=_area_of) if parts else []
        share = np.array([100 / width, 100 / height])
        value |= {"points": (np.array(points) * share).tolist(), "closed": True}
    else:
        kind = "rectanglelabels"
        value = {
            kind: [label],
            "x": 100 * x / width,
            "y": 100 * y / height,
            "width": 100 * w / width,
            "height": 100 * h / height,
            "rotation": 0,
        }
    controls = {"brushlabels": "brush", "rectanglelabels": "box", "polygonlabels": "polygon"}
    return {
        "id": f"p{found.id}",
        "from_name": from_name or controls[kind],
        "to_name": to_name,
        "type": kind,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value,
        "score": found.score,
    }


def label_config(names: Sequence[str]) -> str:
    """Return Label Studio's labelling interface for these classes: boxes, polygons, brushes."""
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    controls = "".join(
        f'  <{tag} name="{name}" toName="image">\n{labels}  </{tag}>\n'
        for tag, name in (
            ("BrushLabels", "brush"),
            ("PolygonLabels", "polygon"),
            ("RectangleLabels", "box"),
        )
    )
    return f'<View>\n  <Image name="image" value="$image"/>\n{controls}</View>\n'


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """Return a mask (H, W) as Label Studio packs the RGBA bytes of a brush stroke.

    `embedded.brush_mask` says how; here every chunk is one word repeated.
    """
    flat = mask.ravel()
    places = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *places.tolist(), flat.size]
    bits = [_bits(4 * flat.size, 32), _bits(8 - 1, 5), *(_bits(size - 1, 4) for size in SIZES)]
    for first, last in itertools.pairwise(bounds):
        word = _bits(255 if flat[first] else 0, 8)
        left = 4 * (last - first)
        while left:
            count = min(left, LONGEST)
            index = next(i for i, size in enumerate(SIZES) if count <= 1 << size)
            bits += ["1", _bits(index, 2), _bits(count - 1, SIZES[index]), word]
            left -= count
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def _bits(number: int, size: int) -> str:
    return format(number, f"0{size}b")


def _area_of(ring: Sequence[Sequence[int]]) -> float:
    x, y = np.array(ring, dtype=np.float64).T
    return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()))
