"""The last lines of a run: what was found before and now, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from app.datasets.coco import Dataset
from app.evaluation.intervals import with_intervals
from app.evaluation.metrics import evaluate
from app.evaluation.summary import gain_in_words


def _results(dataset: Dataset, found: float, seed: int = 0) -> list[dict]:
    """Return detections of a share of the objects, exact, each with its own score."""
    random = np.random.default_rng(seed)
    return [
        {
            "image_id": a.image_id,
            "category_id": a.category_id,
            "bbox": list(a.bbox_xywh),
            "score": float(random.uniform(0.5, 1)),
        }
        for a in dataset.annotations
        if random.random() < found
    ]


def test_counts_of_what_was_found(dataset: Dataset) -> None:
    objects = len(dataset.annotations)
    before = {"bbox/AP": 0.1, "segm/AP": 0.05}
    now = {
        **{"bbox/AP": 0.8, "segm/AP": 0.7, "bbox/AP_low": 0.71, "bbox/AP_high": 0.86},
        "calibration/recall": (objects - 3) / objects,
        "calibration/precision": (objects - 3) / (objects - 2),
    }
    first, second = gain_in_words(before, now, dataset)
    assert first == (
        f"of {objects} objects in 12 validation images: none was found before training, "
        f"{objects - 3} found and 1 false alarm now"
    )
    assert second == (
        "box AP 0.10 before, 0.80 now; mask AP 0.05 before, 0.70 now. Box AP of other such "
        "images: 0.71 to 0.86 (95 %; more images than 12 would narrow that)"
    )
    del now["bbox/AP_low"]  # as in a folder of an earlier version
    assert gain_in_words(before, now, dataset)[1].endswith("0.70 now.")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (0.9, "A gain beyond chance (+0."),
        (0.3, "No gain that 12 images could show (+0.00 box AP, 95 %: +0.00 to +0.00)."),
        (0.0, "A loss beyond chance (-0."),
    ],
)
def test_what_chance_explains_is_no_gain(dataset: Dataset, found: float, said: str) -> None:
    before, now = _results(dataset, 0.3), _results(dataset, found)
    figures = [{"bbox/AP": evaluate(dataset, each)["bbox/AP"]} for each in (before, now)]
    figures[1] = with_intervals(figures[1], dataset, now, before)
    assert f" now. {said}" in gain_in_words(*figures, dataset)[1]


def test_nothing_found(dataset: Dataset) -> None:
    nothing = with_intervals({"bbox/AP": 0.0}, dataset, [], [])
    lines = gain_in_words({"bbox/AP": 0.0}, nothing, dataset)
    assert "none was found now" in lines[0]
    assert "No gain that 12 images could show" in lines[1]
    assert "0.00 to 0.00 (95 %" in lines[1]
