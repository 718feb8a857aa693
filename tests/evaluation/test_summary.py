"""The last lines of a run: what was found before and now, and how sure that is."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from app.datasets.build import load_splits
from app.datasets.coco import Dataset
from app.datasets.synthetic.shapes import make_shapes
from app.evaluation.metrics import evaluate
from app.evaluation.summary import gain_in_words, interval


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    make_shapes(folder, train=12, valid=1, fog=0, width=96, height=64, seed=1)
    return load_splits(folder).train


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
        "bbox/AP": 0.8,
        "segm/AP": 0.7,
        "calibration/recall": (objects - 3) / objects,
        "calibration/precision": (objects - 3) / (objects - 2),
    }
    first, second = gain_in_words(before, now, dataset, _results(dataset, 1))
    assert first == (
        f"of {objects} objects in 12 validation images: none was found before training, "
        f"{objects - 3} found and 1 false alarm now"
    )
    assert second.startswith("box AP 0.10 before, 0.80 now; mask AP 0.05 before, 0.70 now. ")
    assert "more images than 12" in second


def test_the_interval_is_of_the_images(dataset: Dataset) -> None:
    """It holds the AP itself, is narrow where all images are alike, and as a bootstrap by hand."""
    perfect = interval(dataset, _results(dataset, 1))
    assert perfect == (1, 1)
    results = _results(dataset, 0.6)
    low, high = interval(dataset, results)
    ap = evaluate(dataset, results)["bbox/AP"]
    assert 0 < low < ap < high < 1
    random, drawn = np.random.default_rng(0), []
    for _ in range(100):
        images, annotations, detections = [], [], []
        for number, index in enumerate(
            random.integers(0, len(dataset.images), len(dataset.images))
        ):
            image = dataset.images[index]
            images.append(replace(image, id=number + 1))
            for annotation in dataset.annotations_by_image[image.id]:
                new = {"image_id": number + 1, "id": len(annotations) + 1}
                annotations.append(replace(annotation, **new))
            detections += [
                r | {"image_id": number + 1} for r in results if r["image_id"] == image.id
            ]
        sample = Dataset(tuple(images), tuple(annotations), dataset.categories)
        drawn.append(evaluate(sample, detections)["bbox/AP"])
    by_hand = np.quantile(drawn, (0.025, 0.975))
    assert (low, high) == pytest.approx(tuple(by_hand), abs=0.08)


def test_nothing_found(dataset: Dataset) -> None:
    lines = gain_in_words({"bbox/AP": 0.0}, {"bbox/AP": 0.0}, dataset, [])
    assert "none was found now" in lines[0]
    assert re.search(r"0\.00 to 0\.00", lines[1])
