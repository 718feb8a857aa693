"""Draw the curves of a run, and predictions beside their truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.datasets.overlay import color_of, draw_objects, titled
from app.evaluation.charts import PLACE, draw_curves
from app.files import atomic_path


def plot_curves(rows: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write `loss.png` and `ap.png` from the rows of metrics.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = {"train/loss": "training loss"}
    figures = {
        "bbox/AP": "box AP",
        "bbox/AP50": "box AP50",
        "segm/AP": "mask AP",
        "segm/AP50": "mask AP50",
    }
    _plot(rows, losses, "loss", folder / "loss.png")
    _plot(rows, figures, "on validation images, 0 to 1", folder / "ap.png", top=1.0)


def _plot(
    rows: Sequence[Mapping[str, float]],
    series: Mapping[str, str],
    label: str,
    file: Path,
    top: float | None = None,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.add_axes(PLACE)
    draw_curves(axes, rows, series, label)
    axes.set_ylim(top=top)
    with atomic_path(file) as temporary:
        figure.savefig(temporary)


def draw_comparisons(
    dataset: Dataset,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    count: int,
    threshold: float,
) -> list[Path]:
    """Write the first `count` images, truth on the left, prediction on the right."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for image in dataset.images[:count]:
        pixels = open_image(image.path, image.levels)
        detections = [r for r in results if r["image_id"] == image.id and r["score"] > threshold]
        truth = [
            {"category_id": a.category_id, "bbox": a.bbox_xywh, "segmentation": a.segmentation}
            for a in dataset.annotations_by_image[image.id]
        ]
        pair = (
            titled(_draw(pixels, truth, dataset), f"truth: {len(truth)}"),
            titled(
                _draw(pixels, detections, dataset),
                f"predicted over {threshold:g}: {len(detections)}",
            ),
        )
        sheet = Image.new("RGB", (2 * pair[0].width + 8, pair[0].height), "white")
        sheet.paste(pair[0], (0, 0))
        sheet.paste(pair[1], (pair[0].width + 8, 0))
        files.append(folder / f"valid_{len(files) + 1:03d}.png")
        with atomic_path(files[-1]) as temporary:
            sheet.save(temporary)
    return files


def _draw(
    pixels: Image.Image, objects: Sequence[Mapping[str, Any]], dataset: Dataset
) -> Image.Image:
    order = [category.id for category in dataset.categories]
    names = [category.name for category in dataset.categories]
    indices = [order.index(item["category_id"]) for item in objects]
    boxes = np.array([item["bbox"] for item in objects], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [
        names[i] + (f" {item['score']:.2f}" if "score" in item else "")
        for i, item in zip(indices, objects, strict=True)
    ]
    masks = [item.get("segmentation") for item in objects]
    return draw_objects(pixels, boxes, masks, labels, [color_of(i) for i in indices])
