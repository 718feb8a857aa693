from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.build import load_splits
from app.evaluation.report import draw_comparisons, plot_curves


@pytest.mark.drawings
def test_curves_are_drawn_with_what_there_is(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "train/loss": 3.0}, {"epoch": 2, "train/loss": 2.0, "bbox/AP": 0.5}]
    plot_curves(rows, tmp_path / "two")
    plot_curves(rows[:1], tmp_path / "one")
    for folder in ("one", "two"):
        for name in ("loss.png", "ap.png"):
            with Image.open(tmp_path / folder / name) as picture:
                assert picture.size == (840, 480)
    ap = [np.array(Image.open(tmp_path / f / "ap.png").convert("L")) for f in ("one", "two")]
    assert not np.array_equal(*ap)


def test_truth_stands_beside_prediction(shapes: Path, tmp_path: Path) -> None:
    dataset = load_splits(shapes).valid
    image = dataset.images[0]
    truth = dataset.annotations_by_image[image.id]
    perfect = [
        {
            "image_id": image.id,
            "category_id": a.category_id,
            "bbox": list(a.bbox_xywh),
            "segmentation": a.segmentation,
            "score": 0.9,
        }
        for a in truth
    ]
    weak = [{**r, "score": 0.1} for r in perfect]
    files = draw_comparisons(dataset, perfect, tmp_path / "p", count=1, threshold=0.5)
    assert [f.name for f in files] == ["valid_001.png"]
    draw_comparisons(dataset, weak, tmp_path / "w", count=9, threshold=0.5)
    assert len(list((tmp_path / "w").iterdir())) == len(dataset.images)
    sheets = [np.array(Image.open(tmp_path / f / "valid_001.png")) for f in ("p", "w")]
    top, width = sheets[0].shape[0] - image.height, image.width
    pixels = np.array(Image.open(image.path).convert("RGB"))
    assert np.array_equal(sheets[1][top:, width + 8 :], pixels)  # nothing above the threshold
    assert not np.array_equal(sheets[0][top:, width + 8 :], pixels)
    assert np.array_equal(sheets[0][top:, :width], sheets[1][top:, :width])  # the same truth
