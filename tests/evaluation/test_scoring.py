"""Calibration, off-prompt firing, and all figures at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.datasets.build import load_splits
from app.evaluation.calibration import Calibration, calibrate
from app.evaluation.matching import CROWD, MISSES, overlaps
from app.evaluation.off_prompt import Firing, OffPrompts, choose_nouns, off_prompt_figures
from app.evaluation.scoring import score
from app.evaluation.validate import validate
from app.inference.predictor import Predictor
from tests.evaluation.examples import BOX, found, truth

BESIDE = (80, 60, 20, 20)


def test_the_higher_score_chooses_first() -> None:
    dataset = truth((1, 1, BOX), (1, 2, BOX), (1, 1, BESIDE, True))
    results = [
        found(1, 1, BOX, 0.6),
        found(1, 1, BOX, 0.9),
        found(1, 1, BESIDE, 0.5),
        found(1, 2, BESIDE, 0.4),
    ]
    image = overlaps(dataset, results, "segm")[0]
    assert image.scores.tolist() == [0.9, 0.6, 0.5, 0.4]
    assert image.outcomes().tolist() == [0, MISSES, CROWD, MISSES]


def test_the_threshold_lies_between_the_last_hit_and_the_next_miss() -> None:
    dataset = truth((1, 1, BOX), (2, 1, BOX))
    results = [found(1, 1, BOX, 0.4), found(2, 1, BOX, 0.3), found(3, 1, BOX, 0.2)]
    assert calibrate(overlaps(dataset, results, "segm")) == Calibration(
        threshold=pytest.approx(0.25), f1=1.0, precision=1.0, recall=1.0
    )
    assert calibrate(overlaps(dataset, results[2:], "segm")) is None
    assert calibrate(overlaps(dataset, [], "segm")) is None


scores = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.booleans()), max_size=20)


@settings(max_examples=100, deadline=None)
@given(scores)
def test_no_threshold_is_better(detections) -> None:
    """Against F1 counted anew at each threshold, ties included."""
    dataset = truth((1, 1, BOX), (2, 1, BOX), (3, 1, BESIDE))
    results = [found(i, 1, BOX if right else (50, 0, 9, 9), s / 10) for i, s, right in detections]

    def f1(threshold: float) -> float:
        over = [result for result in results if result["score"] > threshold]
        hits = sum((image.outcomes() >= 0).sum() for image in overlaps(dataset, over, "bbox"))
        return 2 * hits / (len(over) + 3)

    best = calibrate(overlaps(dataset, results, "bbox"))
    highest = max(f1(threshold) for threshold in np.linspace(0, 1, 41) - 0.0125)
    assert (best.f1 if best else 0.0) == pytest.approx(highest)
    if best and best.threshold > 0:
        assert f1(best.threshold) == pytest.approx(best.f1)


def test_firing_is_counted_an_image_and_above_the_threshold() -> None:
    """Image 1 has class a; three detections of b over 0.5 in three images, and two on nouns."""
    dataset = truth((1, 1, BOX))
    results = [found(i, 2, BOX, s) for i, s in ((1, 0.9), (1, 0.8), (2, 0.6), (3, 0.5))]
    images = overlaps(dataset, [*results, found(1, 1, BESIDE, 0.9)], "segm")
    firings = tuple(Firing(i, "harp", s) for i, s in ((1, 0.9), (1, 0.7), (2, 0.5)))
    figures = off_prompt_figures(images, OffPrompts(("harp", "yak"), firings), 0.5)
    assert figures == pytest.approx(
        {"off_prompt/firing": 5 / 3, "off_prompt/classes": 1.0, "off_prompt/nouns": 2 / 3}
    )
    assert "off_prompt/nouns" not in off_prompt_figures(images, OffPrompts(), 0.5)


def test_nouns_are_negatives_of_the_image_level_figures() -> None:
    firings = (Firing(1, "harp", 0.9), Firing(1, "harp", 0.8), Firing(2, "harp", 0.4))
    presence = OffPrompts(("harp", "yak"), firings).presence(3)
    assert (presence.false_positives, presence.true_negatives) == (1, 5)


def test_nouns_are_the_seeds_and_none_of_the_classes(shapes: Path) -> None:
    dataset = load_splits(shapes).valid
    assert choose_nouns(dataset, 3, 1) == choose_nouns(dataset, 3, 1) != choose_nouns(dataset, 3, 2)
    assert choose_nouns(dataset, 0, 1) == []


def test_masks_decide_where_there_are_any() -> None:
    dataset = truth((1, 1, BOX))
    wrong_mask = found(1, 1, BOX, 0.9) | {"segmentation": found(1, 1, BESIDE, 0.9)["segmentation"]}
    figures = score(dataset, [wrong_mask, found(1, 1, BOX, 0.3)], threshold=0.5)
    assert figures["bbox/cgF1"] == 1.0
    assert figures["segm/cgF1"] == 0.0
    assert figures["calibration/F1"] == pytest.approx(2 / 3)
    assert figures["calibration/threshold"] == pytest.approx(0.15)


def test_nouns_take_nothing_from_the_classes(tiny_run: Path, shapes: Path) -> None:
    """A model that fires on every word: its results are the same with nouns and without."""
    dataset = load_splits(shapes).valid
    predictor = Predictor.load(tiny_run / "weights" / "best", device="cpu")
    plain = validate(predictor, dataset, max_detections=5, threshold=0.0)
    asked = validate(predictor, dataset, max_detections=5, threshold=0.0, nouns=["harp", "yak"])
    assert asked.results == plain.results
    assert {firing.prompt for firing in asked.off_prompts.firings} <= {"harp", "yak"}
    assert asked.figures["off_prompt/nouns"] == 5.0
    ap = {name: value for name, value in plain.figures.items() if "AP" in name}
    assert ap == {name: asked.figures[name] for name in ap}
