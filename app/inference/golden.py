"""Ask a model about the drawn image of `app.model.golden`."""

from __future__ import annotations

from collections.abc import Sequence

from app.inference.predictor import Predictor
from app.model.golden import ANSWERS, Golden, draw

ASKED = 3  # classes
USUAL = "object"  # where there are none


def answer(predictor: Predictor, prompts: Sequence[str]) -> Golden | None:
    """Return what a model answers about the first of these prompts, or about USUAL.

    None where its scores are none, as those of weights that are not finite.
    """
    asked = [*prompts[:ASKED]] or [USUAL]
    found = predictor.predict(draw(), asked, threshold=0.0, max_detections=ANSWERS)
    scores = [float(score) for score in found.scores]
    if not all(0 <= score <= 1 for score in scores):
        return None
    return Golden(asked, scores, str(predictor.precision).removeprefix("torch."))


def check(predictor: Predictor, golden: Golden) -> str:
    """Return what a model answers otherwise than its weights tell; empty where it does not."""
    found = answer(predictor, golden.prompts)
    return "no scores" if found is None else golden.difference(found)
