"""Figures against pycocotools, the oracle."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.datasets.coco import Annotation, Category, Dataset, Image
from app.evaluation.metrics import evaluate
from tests.helpers import SHARED

NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100"]


def _oracle(truth: dict, results: list[dict], iou_type: str) -> dict[str, float]:
    keep = {"image_id", "category_id", "score", "segmentation" if iou_type == "segm" else "bbox"}
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = json.loads(json.dumps(truth))
        ground.createIndex()
        found = ground.loadRes([{k: v for k, v in r.items() if k in keep} for r in results])
        evaluation = COCOeval(ground, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {f"{iou_type}/{n}": v for n, v in zip(NAMES, evaluation.stats, strict=False)}
    names = {c["id"]: c["name"] for c in truth["categories"]}
    for index, category_id in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        value = precision[precision > -1].mean() if (precision > -1).any() else -1
        figures[f"{iou_type}/AP/{names[category_id]}"] = value
    return {name: value for name, value in figures.items() if value > -1}


class _Truth(Dataset):
    """The published file as it is, which has polygons and crowds."""

    def to_json(self) -> dict:
        return json.loads((SHARED / "coco_val2014_100/instances_val2014_100.json").read_text())


@pytest.mark.parametrize(
    ("iou_type", "published"),
    [("bbox", (0.505, 0.697, 0.573)), ("segm", (0.320, 0.562, 0.299))],
)
def test_the_published_example(iou_type: str, published: tuple[float, ...]) -> None:
    folder = SHARED / "coco_val2014_100"
    if not folder.is_dir():
        pytest.skip("../shared/datasets/coco_val2014_100 is not on this machine")
    results = json.loads((folder / f"instances_val2014_fake{iou_type}100_results.json").read_text())
    document = _Truth((), (), ()).to_json()
    categories = tuple(Category(c["id"], c["name"]) for c in document["categories"])
    from app.evaluation.metrics import _evaluate

    figures = _evaluate(_Truth((), (), categories), results, iou_type)
    expected = _oracle(document, results, iou_type)
    assert figures == pytest.approx(expected, abs=1e-6)
    for name, value in zip(NAMES[:3], published, strict=True):
        assert round(figures[f"{iou_type}/{name}"], 3) == value


WIDTH, HEIGHT = 360, 280  # of the images of random sets: larger than the largest of 96² pixels
Box = tuple[float, float, float, float]


def _rle(box: Box) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    x, y, w, h = (int(side) for side in box)
    mask[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def _within(x: int, y: int, w: int, h: int) -> Box:
    return float(min(max(x, 0), WIDTH - w)), float(min(max(y, 0), HEIGHT - h)), float(w), float(h)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """As likely small as middling as large."""
    sides = st.integers(*draw(st.sampled_from([(1, 31), (33, 95), (97, 250)])))
    corner = draw(st.integers(0, WIDTH)), draw(st.integers(0, HEIGHT))
    return _within(*corner, draw(sides), draw(sides))


images, classes = st.integers(1, 3), st.integers(1, 2)
crowds = st.sampled_from([False, False, False, True])
few = st.sampled_from([0.25, 0.5, 0.75])  # so that scores are tied, within an image and across
scores = few | st.integers(0, 1000).map(lambda number: number / 1000)


@st.composite
def sets(draw: st.DrawFn) -> tuple[Dataset, list[dict]]:
    """Objects, and detections of them or of nothing."""
    object = st.tuples(images, classes, boxes(), crowds)
    objects = draw(st.lists(object, min_size=1, max_size=12))
    moved = st.tuples(st.sampled_from(objects), st.integers(-4, 4), st.integers(-4, 4))
    near = moved.map(
        lambda m: (m[0][0], m[0][1], _within(*map(int, np.add(m[0][2], (m[1], m[2], 0, 0)))))
    )
    detection = st.tuples(near | near | st.tuples(images, classes, boxes()), scores)
    found = draw(st.lists(detection, max_size=3) | st.lists(detection, min_size=8, max_size=30))
    annotations = [
        Annotation(i, image, category, box, _rle(box), box[2] * box[3], crowd)
        for i, (image, category, box, crowd) in enumerate(objects, start=1)
    ]
    truth = Dataset(
        tuple(Image(i, Path(f"/{i}.png"), WIDTH, HEIGHT) for i in (1, 2, 3)),
        tuple(annotations),
        (Category(1, "a"), Category(2, "b")),
    )
    results = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": list(box),
            "score": score,
            "segmentation": _rle(box),
        }
        for (image, category, box), score in found
    ]
    return truth, results


def _tied(results: list[dict], *, across: bool) -> bool:
    """Whether two detections of a class have one score: in one image, or in two."""
    keys = [(r["category_id"], r["score"], r["image_id"]) for r in results]
    if across:
        return len({key[:2] for key in set(keys)}) < len(set(keys))
    return len(set(keys)) < len(keys)


def test_random_sets() -> None:
    seen = Counter[str]()

    @settings(max_examples=100, deadline=None)
    @given(sets())
    def check(drawn: tuple[Dataset, list[dict]]) -> None:
        truth, results = drawn
        figures = evaluate(truth, results)
        if not results:
            assert {"bbox/AP", "segm/AP"} <= set(figures)
            assert set(figures.values()) == {0.0}
            return
        for iou_type in ("bbox", "segm"):
            ours = {k: v for k, v in figures.items() if k.startswith(iou_type)}
            assert ours == pytest.approx(_oracle(truth.to_json(), results, iou_type), abs=1e-6)
        seen["large and found"] += figures.get("segm/AP_large", 0) > 0
        one, ten = (figures.get(f"bbox/AR_{limit}", 0) for limit in (1, 10))
        seen["a second detection counts"] += one < ten
        seen["tied in an image"] += _tied(results, across=False)
        seen["tied across images"] += _tied(results, across=True)

    check()
    assert len(seen) == 4
    assert min(seen.values()) >= 5, seen


@pytest.mark.parametrize(
    ("found", "ap", "recall"),  # the recall of one detection an image
    [
        ([(1, "right"), (1, "wrong")], 1.0, 1.0),  # in one image the earlier result goes first
        ([(1, "wrong"), (1, "right")], 0.5, 0.0),
        ([(1, "right"), (2, "wrong")], 1.0, 1.0),  # and over images the lower number
        ([(2, "wrong"), (1, "right")], 1.0, 1.0),
        ([(0, "wrong"), (1, "right")], 0.5, 1.0),
        ([(1, "right"), (0, "wrong")], 0.5, 1.0),
    ],
)
def test_tied_scores_in_hand_worked_cases(
    found: list[tuple[int, str]], ap: float, recall: float
) -> None:
    """One object of 100 x 100 pixels, and two detections of one score."""
    places = {"right": (20.0, 30.0, 100.0, 100.0), "wrong": (200.0, 30.0, 100.0, 100.0)}
    object = Annotation(1, 1, 1, places["right"], _rle(places["right"]), 1e4, False)
    images = tuple(Image(i, Path(f"/{i}.png"), WIDTH, HEIGHT) for i in (0, 1, 2))
    results = [
        {
            **{"image_id": image, "category_id": 1, "score": 0.5},
            **{"bbox": list(places[place]), "segmentation": _rle(places[place])},
        }
        for image, place in found
    ]
    figures = evaluate(Dataset(images, (object,), (Category(1, "a"),)), results)
    for iou_type in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP_large"):
            assert figures[f"{iou_type}/{name}"] == pytest.approx(ap)
        assert figures[f"{iou_type}/AR_1"] == pytest.approx(recall)
        assert f"{iou_type}/AP_medium" not in figures


def test_boxes_alone_have_no_mask_figures() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    image = Image(1, Path("/1.png"), WIDTH, HEIGHT)
    with_mask = Annotation(1, 1, 1, box, _rle(box), 400.0, False)
    without = Annotation(1, 1, 1, box, None, 400.0, False)
    result = {"image_id": 1, "category_id": 1, "bbox": list(box), "score": 0.9}
    category = (Category(1, "a"),)
    for annotation, found, masks in (
        (with_mask, {**result, "segmentation": _rle(box)}, True),
        (with_mask, result, False),
        (without, {**result, "segmentation": _rle(box)}, False),
    ):
        figures = evaluate(Dataset((image,), (annotation,), category), [found])
        assert figures["bbox/AP"] == pytest.approx(1.0)
        assert ("segm/AP" in figures) is masks


def test_evaluation_prints_nothing(capfd) -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    dataset = Dataset(
        (Image(1, Path("/1.png"), WIDTH, HEIGHT),),
        (Annotation(1, 1, 1, box, _rle(box), 400.0, False),),
        (Category(1, "a"),),
    )
    evaluate(dataset, [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": 0.9}])
    assert capfd.readouterr() == ("", "")
