"""Drawn films: exact masks and identities, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.build import survey
from app.datasets.synthetic.films import LEAST_VISIBLE, draw_film, make_films
from app.errors import UserError

SMALL = {"films": 3, "frames": 12, "fps": 2.0, "width": 96, "height": 72}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "set"
    make_films(folder, **SMALL)
    return folder


def digest(folder: Path) -> str:
    sums = [
        f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def test_the_same_seed_gives_the_same_bytes(films: Path, tmp_path: Path) -> None:
    make_films(tmp_path / "again", **SMALL)
    assert digest(tmp_path / "again") == digest(films)
    make_films(tmp_path / "other", **SMALL, seed=1)
    assert digest(tmp_path / "other") != digest(films)


def test_masks_are_the_visible_pixels(films: Path) -> None:
    """Each shape has one colour of its own, which the background lacks."""
    document = json.loads((films / "_annotations.coco.json").read_text())
    files = {image["id"]: image for image in document["images"]}
    colors: dict[int, np.ndarray] = {}
    for each in document["annotations"]:
        pixels = np.array(Image.open(films / files[each["image_id"]]["file_name"]))
        mask = coco_mask.decode(each["segmentation"]).astype(bool)
        color = colors.setdefault(each["track_id"], pixels[mask][0])
        assert np.array_equal((pixels == color).all(axis=2), mask)
        assert each["area"] == mask.sum() >= LEAST_VISIBLE
    assert len(colors) >= 6


def test_shapes_move_grow_cross_leave_and_come_back() -> None:
    left = hidden = 0
    for seed in range(8):
        film = draw_film(seed, width=160, height=120)
        seen = np.array([[m.sum() for m in film.frame(t / 5)[1]] for t in range(60)])  # 12 s
        shown = seen > 0
        for thing in range(seen.shape[1]):
            changes = np.flatnonzero(np.diff(shown[:, thing].astype(int)))
            left += len(changes) >= 2
            there = seen[shown[:, thing], thing]
            assert there.std() > 0
        tops = [np.sum(film.frame(t / 5)[1], axis=0).max() for t in range(60)]
        assert max(tops) == 1  # a pixel is of one thing
        alone = [film.ways[0].at(t / 5) for t in range(60)]
        assert len({round(shape.radius, 3) for shape in alone}) > 30
        hidden += film.ways[0].spin != 0
    assert left >= 5
    assert hidden == 8


def test_it_is_a_dataset_of_images_as_well(films: Path) -> None:
    train = survey(films).splits["train"]
    assert len(train.images) == SMALL["films"] * SMALL["frames"]
    document = json.loads((films / "_annotations.coco.json").read_text())
    assert len(train.annotations) == len(document["annotations"])
    assert {image["video_id"] for image in document["images"]} == {1, 2, 3}
    frames = [image["frame_id"] for image in document["images"] if image["video_id"] == 2]
    assert frames == list(range(SMALL["frames"]))


def test_what_is_out_of_range_is_told_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_films(tmp_path, films=0, frames=0, width=8, label_by="colour")
    assert len(caught.value.problems) == 4
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other"):
        make_films(tmp_path)
    assert (tmp_path / "mine.txt").exists()
