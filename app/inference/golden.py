"""Ask a model about the drawn image of `app.model.golden`."""

from __future__ import annotations

from collections.abc import Sequence

from app.inference.predictor import Predictor
from app.model.golden import ANSWERS, Golden, draw

ASKED = 3  # classes
USUAL = "object"  # where there are none


def answer(predictor: Predictor, prompts: Sequence[str]) -> Golden:
    """Return what a model answers about the first of these prompts, or about one of its own."""
    asked = [*prompts[:ASKED]] or [USUAL]
    found = predictor.predict(draw(), asked, threshold=0.0, max_detections=ANSWERS)
    precision = str(predictor.precision).removeprefix("torch.")
    return Golden(asked, [float(score) for score in found.scores], precision)


def check(predictor: Predictor, golden: Golden) -> str:
    """Return what a model answers otherwise than its weights tell; empty where it does not."""
    return golden.difference(answer(predictor, golden.prompts))
