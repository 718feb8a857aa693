"""cgF1 and what it is made of: hand-worked cases, and upstream's own evaluator as the oracle."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sam3.eval.cgf1_eval import CGF1Evaluator

from app.datasets.coco import Dataset
from app.evaluation.concepts import Presence, concept_figures
from app.evaluation.matching import overlaps
from tests.evaluation.examples import BOX, IMAGES, found, truth


def _figures(dataset: Dataset, results: list[dict], iou_type: str = "segm") -> dict[str, float]:
    categories = [category.id for category in dataset.categories]
    return concept_figures(overlaps(dataset, results, iou_type), categories)


def test_all_found_and_nothing_else() -> None:
    figures = _figures(truth((1, 1, BOX)), [found(1, 1, BOX, 0.9)])
    assert figures == {"pmF1": 1.0, "IL_MCC": 1.0, "IL_F1": 1.0, "cgF1": 1.0}


def test_worked_by_hand() -> None:
    """Two objects in one pair, one of them found at IoU 0.8, one detection beside them.

    IoU 0.50 to 0.80 (seven thresholds): TP 1, FP 1, FN 1, so F1 = 2/4. Above: 0. pmF1 = 0.35.
    Six pairs: one found rightly, one wrongly (image 2, class b), four rightly silent.
    MCC = (1*4 - 1*0) / √(2 * 1 * 5 * 4) = 4/√40.
    """
    dataset = truth((1, 1, (0, 0, 10, 10)), (1, 1, (50, 50, 10, 10)))
    results = [
        found(1, 1, (0, 0, 10, 8), 0.9),
        found(1, 1, (80, 0, 10, 10), 0.6),
        found(2, 2, BOX, 0.5),
        found(3, 1, BOX, 0.49),  # under 0.5: not said
    ]
    figures = _figures(dataset, results)
    assert figures["pmF1"] == pytest.approx(0.35)
    assert figures["IL_MCC"] == pytest.approx(4 / math.sqrt(40))
    assert figures["IL_F1"] == pytest.approx(2 / 3)
    assert figures["cgF1"] == pytest.approx(0.35 * 4 / math.sqrt(40))


def test_a_false_alarm_costs_mcc_and_not_pmf1() -> None:
    dataset = truth((1, 1, BOX))
    right = found(1, 1, BOX, 0.9)
    alone, alarmed = (_figures(dataset, [right, *more]) for more in ([], [found(2, 1, BOX, 0.9)]))
    assert alone["pmF1"] == alarmed["pmF1"] == 1.0
    assert alarmed["IL_MCC"] < alone["IL_MCC"]


def test_nothing_found_and_nothing_there() -> None:
    assert _figures(truth((1, 1, BOX)), []) == {
        "pmF1": 0.0, "IL_MCC": 0.0, "IL_F1": 0.0, "cgF1": 0.0
    }  # fmt: skip
    assert _figures(truth(), [found(1, 1, BOX, 0.9)]) == {}


def test_one_class_that_every_image_has() -> None:
    """Without a pair that lacks its thing there is no MCC; nouns that no image shows mend it."""
    dataset = Dataset(IMAGES[:1], truth((1, 1, BOX)).annotations, truth().categories[:1])
    images = overlaps(dataset, [found(1, 1, BOX, 0.9)], "segm")
    assert concept_figures(images, [1]) == {"pmF1": 1.0}
    silent = Presence(true_negatives=4)
    assert concept_figures(images, [1], silent)["cgF1"] == 1.0
    assert concept_figures(images, [1], Presence(false_positives=4))["cgF1"] == 0.0


boxes = st.tuples(st.integers(0, 60), st.integers(0, 50), st.integers(5, 60), st.integers(5, 50))
objects = st.tuples(st.integers(1, 3), st.integers(1, 2), boxes, st.booleans())
finds = st.tuples(st.integers(1, 3), st.integers(1, 2), boxes, st.integers(0, 100))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    labels=st.lists(objects, min_size=1, max_size=12),
    detections=st.lists(finds, max_size=20),
    near=st.booleans(),
)
def test_upstreams_evaluator(labels, detections, near, tmp_path: Path) -> None:
    """Where both define a figure; upstream's 1e-4 in the denominators is the tolerance."""
    dataset = truth(*labels)
    results = [found(i, c, box, score / 100) for i, c, box, score in detections]
    if near:  # some that find something
        results += [found(i, c, (x, y, w, h - 1), 0.9) for i, c, (x, y, w, h), _ in labels]
    for iou_type in ("bbox", "segm"):
        figures = _figures(dataset, results, iou_type)
        theirs = _upstream(dataset, results, iou_type, tmp_path)
        for ours, name in (("pmF1", "positive_micro_F1"), ("IL_MCC", "IL_MCC"), ("cgF1", "cgF1")):
            if ours in figures:
                assert figures[ours] == pytest.approx(theirs[name], abs=1e-3), name


def _upstream(dataset: Dataset, results: list[dict], iou_type: str, folder: Path) -> dict:
    """Its "images" are pairs: each image and class gets an id of its own."""
    document = dataset.to_json()
    pairs = [(i["id"], c["id"]) for i in document["images"] for c in document["categories"]]
    ids = {pair: number for number, pair in enumerate(pairs, start=1)}
    size = {"width": 120, "height": 100, "is_instance_exhaustive": True}
    document["images"] = [{"id": number, "file_name": "x", **size} for number in ids.values()]
    for entry in (*document["annotations"], *(results := [dict(r) for r in results])):
        entry["image_id"] = ids[entry["image_id"], entry["category_id"]]
        entry["category_id"] = 1
    document["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "truth.json").write_text(json.dumps(document))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = CGF1Evaluator(str(folder / "truth.json"), iou_type)
        figures = evaluator.evaluate(str(folder / "found.json"))
    return {name.removeprefix(f"cgF1_eval_{iou_type}_"): v for name, v in figures.items()}
