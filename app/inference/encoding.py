"""A dataset of a few boxes → the concepts that they show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from app.console import counted
from app.datasets.build import survey
from app.datasets.coco import Annotation, Dataset
from app.datasets.images import open_image
from app.errors import UserError
from app.inference.concepts import Concept
from app.inference.predictor import Predictor
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
MOST_BOXES = 16  # of a class: beyond these the scores are a mean of too many tokens


def read_examples(folder: Path) -> Dataset:
    """Read the boxes of a dataset, of whatever format training reads: its training split's.

    Raises:
        UserError: every problem of it, or there are no boxes.
    """
    surveyed = survey(folder)
    surveyed.require_sound(0.0)
    examples = surveyed.splits["train"]
    objects = [annotation for annotation in examples.annotations if not annotation.iscrowd]
    if not objects:
        raise UserError(f"--examples {folder}: has no boxes; draw one around each example")
    return Dataset(examples.images, tuple(objects), examples.categories)


def class_names(examples: Dataset) -> tuple[str, ...]:
    """Return the names of the classes that have boxes."""
    shown = {annotation.category_id for annotation in examples.annotations}
    return tuple(category.name for category in examples.categories if category.id in shown)


def encode(predictor: Predictor, examples: Dataset, *, words: bool = False) -> list[Concept]:
    """Return a concept of each class that has boxes.

    Args:
        examples: as `read_examples` returns them.
        words: let the class's name be read beside its boxes.
    """
    concepts = []
    for category in examples.categories:
        boxes = [each for each in examples.annotations if each.category_id == category.id]
        if not boxes:
            continue
        if len(boxes) > MOST_BOXES:
            log.info(
                "note: '%s': %s are taken of %d",
                category.name,
                counted(MOST_BOXES, "box"),
                len(boxes),
            )
            boxes = boxes[:: -(-len(boxes) // MOST_BOXES)]
        name = category.name if words else VISUAL_PROMPT
        concepts.append(concept_of(predictor, examples, category.name, boxes, name))
    return concepts


def concept_of(
    predictor: Predictor, examples: Dataset, name: str, boxes: Sequence[Annotation], words: str
) -> Concept:
    """Return the concept of these boxes of a dataset."""
    images = {image.id: image for image in examples.images}
    places = dict.fromkeys(annotation.image_id for annotation in boxes)
    shots = [
        (
            open_image(images[place].path, predictor.levels or images[place].levels),
            [each.bbox_xywh for each in boxes if each.image_id == place],
        )
        for place in places
    ]
    return predictor.concept(name, shots, words=words)
