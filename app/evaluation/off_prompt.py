"""Count firing on prompts for absent things: a model tuned on few classes may answer any word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.datasets.coco import Dataset
from app.datasets.prompts import nouns_beside
from app.evaluation.concepts import SCORE, Presence
from app.evaluation.matching import Overlaps


@dataclass(frozen=True)
class Firing:
    """Hold a detection on a noun that names nothing in its image."""

    image_id: int
    prompt: str
    score: float


@dataclass(frozen=True)
class OffPrompts:
    """Hold the nouns that every image was asked for, and the detections on them."""

    nouns: tuple[str, ...] = ()
    firings: tuple[Firing, ...] = ()

    def presence(self, images: int) -> Presence:
        """Count the (image, noun) pairs for the image-level figures of SAM 3's paper."""
        fired = len({(f.image_id, f.prompt) for f in self.firings if f.score >= SCORE})
        return Presence(false_positives=fired, true_negatives=images * len(self.nouns) - fired)


def choose_nouns(dataset: Dataset, count: int, seed: int) -> list[str]:
    """Choose `count` common nouns that share no word with any class; a seed has always the same."""
    names = [name for c in dataset.categories for name in (c.name, *c.synonyms)]
    nouns = nouns_beside(names)
    return random.Random(seed).sample(nouns, min(count, len(nouns)))


def off_prompt_figures(
    images: Sequence[Overlaps], off_prompts: OffPrompts, threshold: float
) -> dict[str, float]:
    """Return the mean false positives an image, above the threshold, on prompts for absent things.

    Returns:
        "off_prompt/classes": on classes that the image lacks; "off_prompt/nouns": on nouns, where
        any were asked for; "off_prompt/firing": on both.
    """
    if not images:
        return {}
    absent = sum(firing_of(image, threshold) for image in images)
    figures = {"off_prompt/classes": absent / len(images)}
    if off_prompts.nouns:
        fired = sum(firing.score > threshold for firing in off_prompts.firings)
        figures["off_prompt/nouns"] = fired / len(images)
    return {"off_prompt/firing": sum(figures.values()), **figures}


def firing_of(image: Overlaps, threshold: float) -> int:
    """Count detections above the threshold of classes that the image lacks."""
    return int(((image.scores > threshold) & ~np.isin(image.detected, image.objects)).sum())
