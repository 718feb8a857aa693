"""A dataset through the predictor: the figures of validation come from what `infer.sh` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.evaluation.concepts import SCORE
from app.evaluation.off_prompt import Firing, OffPrompts
from app.evaluation.scoring import score
from app.inference.detections import Detections
from app.inference.outputs import coco_results


@dataclass(frozen=True)
class Validation:
    """The figures of `evaluation.scoring.score`, and what they stand on: COCO results, firings."""

    figures: dict[str, float]
    results: list[dict[str, Any]]
    off_prompts: OffPrompts


class Finder(Protocol):
    """What answers prompts: a `Predictor`, or the `Runtime` of exported graphs."""

    def predict(
        self,
        image: Image.Image,
        prompts: Sequence[str] = ...,
        *,
        threshold: float | None = ...,
        max_detections: int = ...,
    ) -> Detections: ...


def validate(
    predictor: Finder,
    dataset: Dataset,
    *,
    max_detections: int,
    threshold: float = SCORE,
    nouns: Sequence[str] = (),
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Validation:
    """Ask for every class in every image, and for the nouns; score the answers.

    Args:
        max_detections: an image, over all classes.
        threshold: 0..1, above which a detection on what is not there is counted.
        nouns: things that no image shows; they take no detection's place among the classes.
        on_image: called with the number of images done and their total.
    """
    prompts = [category.name for category in dataset.categories]
    category_ids = [category.id for category in dataset.categories]
    results: list[dict[str, Any]] = []
    firings: list[Firing] = []
    for done, image in enumerate(dataset.images, start=1):
        pixels = open_image(image.path)
        detections = predictor.predict(
            pixels, prompts, threshold=0.0, max_detections=max_detections
        )
        results += coco_results(detections, image.id, category_ids)
        if nouns:
            found = predictor.predict(
                pixels, nouns, threshold=min(threshold, SCORE), max_detections=max_detections
            )
            pairs = zip(found.prompt_ids, found.scores, strict=True)
            firings += [Firing(image.id, nouns[id], float(value)) for id, value in pairs]
        on_image(done, len(dataset.images))
    off_prompts = OffPrompts(tuple(nouns), tuple(firings))
    figures = score(dataset, results, threshold=threshold, off_prompts=off_prompts)
    return Validation(figures, results, off_prompts)
