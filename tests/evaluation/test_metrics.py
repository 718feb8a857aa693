"""Figures against pycocotools, the oracle."""

from __future__ import annotations

import contextlib
import io
import json
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
from tests.conftest import SHARED

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


def _box(numbers: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    x, y, w, h = numbers
    return float(x), float(y), float(w), float(h)


def _rle(box: tuple[float, float, float, float]) -> dict:
    mask = np.zeros((100, 120), dtype=np.uint8)
    x, y, w, h = (int(side) for side in box)
    mask[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": [100, 120], "counts": rle["counts"].decode()}


boxes = st.tuples(st.integers(0, 60), st.integers(0, 50), st.integers(1, 60), st.integers(1, 50))
objects = st.tuples(st.integers(1, 3), st.integers(1, 2), boxes.map(_box), st.booleans())
finds = st.tuples(st.integers(1, 3), st.integers(1, 2), boxes.map(_box), st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(st.lists(objects, min_size=1, max_size=12), st.lists(finds, max_size=20))
def test_random_sets(truth_objects, found) -> None:
    annotations = [
        Annotation(i, image, category, box, _rle(box), box[2] * box[3], crowd)
        for i, (image, category, box, crowd) in enumerate(truth_objects, start=1)
    ]
    truth = Dataset(
        tuple(Image(i, Path(f"/{i}.png"), 120, 100) for i in (1, 2, 3)),
        tuple(annotations),
        (Category(1, "a"), Category(2, "b")),
    )
    results = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": list(box),
            "score": (score + i / 100) / 1001,  # no ties: their order is not defined
            "segmentation": _rle(box),
        }
        for i, (image, category, box, score) in enumerate(found)
    ]
    figures = evaluate(truth, results)
    if not results:
        assert {"bbox/AP", "segm/AP"} <= set(figures)
        assert set(figures.values()) == {0.0}
        return
    for iou_type in ("bbox", "segm"):
        ours = {k: v for k, v in figures.items() if k.startswith(iou_type)}
        assert ours == pytest.approx(_oracle(truth.to_json(), results, iou_type), abs=1e-6)


def test_boxes_alone_have_no_mask_figures() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    image = Image(1, Path("/1.png"), 120, 100)
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
        (Image(1, Path("/1.png"), 120, 100),),
        (Annotation(1, 1, 1, box, _rle(box), 400.0, False),),
        (Category(1, "a"),),
    )
    evaluate(dataset, [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": 0.9}])
    assert capfd.readouterr() == ("", "")
