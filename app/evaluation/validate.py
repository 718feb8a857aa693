"""A dataset through the predictor: the figures of validation come from what `infer.sh` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.evaluation.metrics import evaluate
from app.inference.outputs import coco_results
from app.inference.predictor import Predictor


def validate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    max_detections: int,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Ask for every class in every image, and score the answers.

    Args:
        max_detections: an image, over all classes.
        on_image: called with the number of images done and their total.

    Returns:
        The figures of `evaluation.metrics.evaluate`, and the COCO results they stand on.
    """
    prompts = [category.name for category in dataset.categories]
    category_ids = [category.id for category in dataset.categories]
    results: list[dict[str, Any]] = []
    for done, image in enumerate(dataset.images, start=1):
        detections = predictor.predict(
            open_image(image.path), prompts, threshold=0.0, max_detections=max_detections
        )
        results += coco_results(detections, image.id, category_ids)
        on_image(done, len(dataset.images))
    return evaluate(dataset, results), results
