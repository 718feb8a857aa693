"""Counts of scores are those of numpy's histogram, and are kept with the weights."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from app.config.compose import load_model_config
from app.model.score_counts import BINS, ScoreCounts, bins_of, count_scores
from app.model.weights import Header

CLASSES = {7: "car", 9: "bus", 11: "tram"}


def _results() -> list[dict]:
    numbers = np.random.default_rng(0)
    return [
        {
            "image_id": int(numbers.integers(1, 6)),
            "category_id": int(numbers.choice([7, 9])),
            "score": float(numbers.random(dtype=np.float32)),
        }
        for _ in range(400)
    ]


def test_counts_are_those_of_a_histogram() -> None:
    results = _results()
    counted = count_scores(5, CLASSES, results, 0.33)
    for id, name in ((7, "car"), (9, "bus")):
        above = [r for r in results if r["category_id"] == id and r["score"] > 0.33]
        scores = [result["score"] for result in above]
        histogram, _ = np.histogram(scores, bins=BINS, range=(0, 1))
        assert counted.counts[name] == histogram.tolist()
        assert counted.found[name] == len({result["image_id"] for result in above})
    assert "tram" not in counted.counts
    assert counted.images == 5


def test_the_highest_score_is_in_the_last_bin() -> None:
    assert bins_of([0.0, 0.0499, 0.05, 0.999, 1.0]).tolist() == [0, 0, 1, 19, 19]


def test_a_header_keeps_them_and_refuses_what_is_none() -> None:
    model = load_model_config("nano")
    scores = count_scores(5, CLASSES, _results(), 0.5)
    text = Header(model=model, scores=scores).model_dump_json()
    assert Header.model_validate_json(text).scores == scores
    with pytest.raises(ValidationError, match="must be 20 numbers"):
        Header.model_validate_json(text.replace('"counts":{"', '"counts":{"x":[1,2],"'))
    with pytest.raises(ValueError, match="whole numbers of 0 or more"):
        ScoreCounts(3, {"car": -1}, {})
