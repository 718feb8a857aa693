"""AP by example boxes: what is asked, and of which boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.config.compose import load_config
from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.evaluation.by_examples import score_by_examples
from app.evaluation.summary import BY_EXAMPLES
from app.inference import Detections, Predictor
from app.model.build import build_model
from app.model.bundled import NANO
from tests.helpers import MICRO, Command, metrics

CONFIG = load_config(MICRO).model


@pytest.fixture
def predictor(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """One that knows the truth, and finds the objects of the class that a box of it shows."""
    torch.manual_seed(0)
    predictor = Predictor(build_model(CONFIG), CONFIG)
    names = {category.name: category.id for category in dataset.categories}

    def found(image: Any, prompts: Any, *, boxes_xywh: Any = (), **_: Any) -> Detections:
        """Answer about the images in their order, as they are asked."""
        truth = predictor.truth[image.size, image.tobytes()]  # type: ignore[attr-defined]
        wanted = [names[p] for p in prompts if p in names]
        if boxes_xywh:
            wanted = [a.category_id for a in truth if a.bbox_xywh == boxes_xywh[0]][:1]
        kept = [(a, wanted.index(a.category_id)) for a in truth if a.category_id in wanted]
        corners = [(x, y, x + w, y + h) for a, _ in kept for x, y, w, h in [a.bbox_xywh]]
        boxes = np.array(corners, dtype=np.float32).reshape(-1, 4)
        ids = np.array([0 if boxes_xywh else place for _, place in kept], dtype=np.int64)
        scores = np.full(len(kept), 0.9, dtype=np.float32)
        predictor.asked.append((tuple(prompts), tuple(predictor.concepts)))  # type: ignore[attr-defined]
        return Detections(boxes, scores, ids, tuple(prompts), None, *image.size)

    predictor.asked = []  # type: ignore[attr-defined]
    predictor.truth = {  # type: ignore[attr-defined]
        (opened.size, opened.tobytes()): dataset.annotations_by_image[image.id]
        for image in dataset.images
        for opened in [open_image(image.path)]
    }
    monkeypatch.setattr(predictor, "predict", found)
    return predictor


def test_each_kind_asks_what_it_says(predictor: Any, dataset: Dataset) -> None:
    boxes = replace(
        dataset, annotations=tuple(replace(a, segmentation=None) for a in dataset.annotations)
    )
    kinds = ["box", "both", "other"]
    figures = score_by_examples(predictor, boxes, boxes, kinds, max_detections=100)
    for kind in ("box", "both", "other1", "other3", "other5"):
        assert figures[f"{kind}/bbox/AP"] == pytest.approx(1.0)
    pairs = {(a.image_id, a.category_id) for a in dataset.annotations}
    by_box, by_both = predictor.asked[: len(pairs)], predictor.asked[len(pairs) : 2 * len(pairs)]
    assert {prompts for prompts, _ in by_box} == {("visual",)}
    names = {category.name for category in dataset.categories}
    assert {prompts for prompts, _ in by_both} == {(name,) for name in names}
    others = predictor.asked[2 * len(pairs) :]
    assert len(others) == 3 * len(dataset.images)
    assert {(set(prompts) == names, set(known) == names) for prompts, known in others} == {
        (True, True)
    }
    assert not predictor.concepts  # as before


def test_words_alone_need_nothing(predictor: Any, dataset: Dataset) -> None:
    assert score_by_examples(predictor, dataset, dataset, ["words"], max_detections=9) == {}
    assert not predictor.asked


def test_the_command_tells_them(command: Command, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored"
    words = ("evaluate", "--checkpoint", NANO, "--dataset-dir", shapes, "--output-dir", out)
    done = command(*words, "evaluation.prompts=[words,box,both,other]", "evaluation.pictures=0")
    assert done.code == 0, done.err
    figures = metrics(out)
    for kind, said in BY_EXAMPLES.items():
        low, high = figures[f"{kind}_low"], figures[f"{kind}_high"]
        assert f"{said} {figures[kind]:.3f} ({low:.2f} to {high:.2f})" in done.out
        assert 0 <= low <= figures[kind] <= high <= 1
    assert "box AP by 3 boxes of others" in (out / "report.html").read_text()
