"""A folder of images becomes a dataset by what weights find in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from app.datasets.build import load_splits
from app.datasets.images import open_image
from app.files import atomic_folder
from app.inference import Predictor
from tests.helpers import REPOSITORY, Command

NANO = REPOSITORY / "app" / "assets" / "nano"
SCENE = REPOSITORY / "examples" / "scene.png"


def test_what_is_found_are_the_labels(tmp_path: Path, command: Command) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(SCENE, photos / name)
    (photos / "broken.png").write_bytes(SCENE.read_bytes()[:900])
    words = ("label", "--input", photos, "--checkpoint", NANO, "--output-dir", tmp_path / "set")
    asked = ("--prompt", "circle", "--prompt", "red thing", "--prompt", "hexagone")
    done = command(*words, *asked, "--threshold", "0.6")
    assert done.code == 3
    assert "'hexagone' is no class of these weights" in done.out
    assert "Did you mean 'hexagon'?" in done.out
    assert "left out: " in done.out
    assert "broken.png" in done.out
    assert "4 objects in 2 images (circle 2, red thing 2, hexagone 0): " in done.out
    dataset = load_splits(tmp_path / "set", valid_fraction=0.5, test_fraction=0).train
    assert dataset.class_names == ["circle", "red thing", "hexagone"]
    (image,) = dataset.images
    found = Predictor.load(NANO).predict(open_image(SCENE), ["circle", "red thing"], threshold=0.6)
    assert len(dataset.annotations) == len(found) == 2
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a.bbox_xywh for a in dataset.annotations)]
    np.testing.assert_allclose(boxes, found.boxes_xyxy, atol=12)  # those of the masks
    np.testing.assert_array_equal(
        [a.bbox_xywh for a in dataset.annotations], [coco_mask.toBbox(m) for m in found.masks]
    )
    assert [a.segmentation for a in dataset.annotations] == found.masks
    assert image.path.read_bytes() == SCENE.read_bytes()

    done = command(*words, "--prompt", "circle")
    assert done.code == 2
    assert "is there already" in done.err


def test_a_second_labelling_of_one_folder_is_refused_and_loses_nothing(
    tmp_path: Path, command: Command
) -> None:
    words = ("label", "--input", SCENE, "--checkpoint", NANO, "--output-dir", tmp_path / "set")
    with atomic_folder(tmp_path / "set") as first:  # as another process would
        (first / "labels").write_text("finished")
        done = command(*words, "--prompt", "circle")
        assert done.code == 2
        assert "another process is writing it" in done.err
    assert command(*words, "--prompt", "circle").code == 2
    assert (tmp_path / "set" / "labels").read_text() == "finished"


def test_nothing_found_is_no_dataset(tmp_path: Path, command: Command) -> None:
    done = command(
        *("label", "--input", SCENE, "--checkpoint", NANO, "--output-dir", tmp_path / "set"),
        *("--prompt", "circle", "--threshold", "0.999"),
    )
    assert done.code == 2
    shows = re.search(r"of which the highest is 0\.\d+: --threshold (\S+),", done.err)[1]
    done = command(
        *("label", "--input", SCENE, "--checkpoint", NANO, "--output-dir", tmp_path / "one"),
        *("--prompt", "circle", "--threshold", shows),
    )
    assert done.code == 0, done.err
    assert not (tmp_path / "set").exists()
