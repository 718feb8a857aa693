"""Score weights by example boxes as well as by words, as `odinw_visual_only` of upstream does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from app.console import progress
from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.evaluation.intervals import with_intervals
from app.evaluation.metrics import evaluate
from app.inference.encoding import concept_of
from app.inference.outputs import coco_results
from app.inference.predictor import Predictor
from app.model.vocabulary import VISUAL_PROMPT

SHOTS = (1, 3, 5)  # boxes of other images


def score_by_examples(
    predictor: Predictor,
    examples: Dataset,
    dataset: Dataset,
    kinds: Sequence[str],
    *,
    max_detections: int,
    seed: int = 0,
) -> dict[str, float]:
    """Return COCO's figures by kind of prompt: "box/bbox/AP", "both/…", "other1/…", …; AP's bounds.

    Args:
        examples: images whose boxes stand for classes in others.
        dataset: the images to score.
        kinds: box: one box of the class in the very image, for each class that it shows; both: with
            the class's name; other: for every class, one, three and five boxes of other images,
            without words.
        max_detections: an image, over all classes.
        seed: of which boxes are taken.
    """
    figures: dict[str, float] = {}
    for kind in ("box", "both"):
        if kind in kinds:
            results = _by_own_boxes(predictor, dataset, kind == "both", max_detections, seed)
            figures |= _named(kind, dataset, results)
    for shots in SHOTS if "other" in kinds else ():
        results = _by_other_boxes(predictor, examples, dataset, shots, max_detections, seed)
        figures |= _named(f"other{shots}", dataset, results)
    return figures


def _named(kind: str, truth: Dataset, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    figures = with_intervals(evaluate(truth, results), truth, results)
    return {f"{kind}/{name}": value for name, value in figures.items()}


def _by_own_boxes(
    predictor: Predictor, dataset: Dataset, words: bool, max_detections: int, seed: int
) -> list[dict[str, Any]]:
    """Return results of one box a class in the image that has it."""
    chance, results = random.Random(seed), []
    title = "by a box and words: image" if words else "by a box: image"
    with progress(title, len(dataset.images)) as advance:
        for done, image in enumerate(dataset.images, 1):
            pixels = open_image(image.path, predictor.levels or image.levels)
            objects = [a for a in dataset.annotations_by_image[image.id] if not a.iscrowd]
            for category in dataset.categories:
                boxes = [a.bbox_xywh for a in objects if a.category_id == category.id]
                if not boxes:
                    continue
                found = predictor.predict(
                    pixels,
                    [category.name] if words else [VISUAL_PROMPT],
                    boxes_xywh=[chance.choice(boxes)],
                    threshold=0.0,
                    max_detections=max_detections,
                )
                results += coco_results(found, image.id, [category.id])
            advance(done, "")
    return results


def _by_other_boxes(
    predictor: Predictor,
    examples: Dataset,
    dataset: Dataset,
    shots: int,
    max_detections: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return results of boxes of other images; classes without any are asked by their words."""
    chance = random.Random(seed)
    before, concepts = predictor.concepts, []
    for category in examples.categories:
        boxes = [a for a in examples.annotations if a.category_id == category.id and not a.iscrowd]
        if boxes:
            drawn = chance.sample(boxes, min(shots, len(boxes)))
            concepts.append(concept_of(predictor, examples, category.name, drawn, VISUAL_PROMPT))
    names = [category.name for category in dataset.categories]
    category_ids = [category.id for category in dataset.categories]
    results: list[dict[str, Any]] = []
    predictor.learn(concepts)
    try:
        title = f"by {shots} of other images: image"
        with progress(title, len(dataset.images)) as advance:
            for done, image in enumerate(dataset.images, 1):
                pixels = open_image(image.path, predictor.levels or image.levels)
                found = predictor.predict(
                    pixels, names, threshold=0.0, max_detections=max_detections
                )
                results += coco_results(found, image.id, category_ids)
                advance(done, "")
    finally:
        predictor.learn([*before.values()])
    return results
