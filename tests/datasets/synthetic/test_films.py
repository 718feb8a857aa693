"""Drawn films: the same for the same seed, and what they say is what they show."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets.build import survey
from app.datasets.synthetic.films import COLORS, KINDS, draw_film, make_films
from app.errors import UserError


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "set"
    make_films(folder, films=3, frames=12, fps=4.0, width=96, height=72, seed=3, label_by="both")
    return folder


@pytest.fixture(scope="module")
def document(films: Path) -> dict[str, Any]:
    return json.loads((films / "_annotations.coco.json").read_text())


def test_the_same_for_the_same_seed(films: Path, tmp_path: Path) -> None:
    same = {"films": 3, "frames": 12, "fps": 4.0, "width": 96, "height": 72, "label_by": "both"}
    make_films(tmp_path / "again", **same, seed=3)
    assert digest(tmp_path / "again") == digest(films)
    make_films(tmp_path / "other", **same, seed=4)
    assert digest(tmp_path / "other")["0001/000000.png"] != digest(films)["0001/000000.png"]


def test_masks_are_what_is_seen(films: Path, document: dict[str, Any]) -> None:
    """Each mask has one color alone, no two share a pixel, and a thing keeps its class and id."""
    images = {each["id"]: each for each in document["images"]}
    names = {each["id"]: each["name"] for each in document["categories"]}
    seen: dict[int, np.ndarray] = {}
    classes: dict[int, set[str]] = {}
    taken: dict[int, np.ndarray] = {}
    for each in document["annotations"]:
        image = images[each["image_id"]]
        mask = coco_mask.decode(each["segmentation"]).astype(bool)
        assert mask.sum() == each["area"] >= 16
        pixels = np.asarray(Image.open(films / image["file_name"]))
        color = seen.setdefault(each["track_id"], pixels[mask][0])
        assert np.array_equal((pixels == color).all(axis=2), mask)
        assert not (taken.setdefault(image["id"], np.zeros_like(mask)) & mask).any()
        taken[image["id"]] |= mask
        classes.setdefault(each["track_id"], set()).add(names[each["category_id"]])
        assert each["video_id"] == image["video_id"]
    assert all(len(found) == 1 for found in classes.values())
    assert [video["length"] for video in document["videos"]] == [12, 12, 12]
    assert len(images) == 36


def test_it_is_a_dataset_of_images_as_well(films: Path, document: dict[str, Any]) -> None:
    train = survey(films).splits["train"]
    assert len(train.images) == 36
    assert len(train.annotations) == len(document["annotations"])


def test_things_move_turn_grow_cross_leave_and_come_back() -> None:
    crossed = left = back = grew = turned = 0
    for seed in range(8):
        film = draw_film((0, seed))
        hidden: dict[int, list[bool]] = {}
        for frame in range(0, 240, 6):
            time = frame / 20
            _, masks = film.frame(time)
            for number, (way, mask) in enumerate(zip(film.ways, masks, strict=True)):
                shape = way.at(time)
                inside = -shape.radius < shape.x < 320 + shape.radius
                hidden.setdefault(number, []).append(not mask.any())
                whole = shape.stamp()[2].sum()
                far = shape.radius < shape.x < 320 - shape.radius
                far &= shape.radius < shape.y < 240 - shape.radius
                crossed += bool(inside and far and 0 < mask.sum() < 0.8 * whole)
                grew += abs(shape.radius / way.shape.radius - 1) > 0.1
                turned += abs(shape.turn) > 0.1
        for states in hidden.values():
            gone = [n for n, state in enumerate(states) if state]
            left += bool(gone and not all(states[: gone[0]]) and not states[0])
            back += bool(gone and not all(states[gone[0] :]) and not states[0])
        looks = {(thing.kind, thing.color) for thing in film.things}
        assert len(looks) == len(film.things)
        assert {kind for kind, _ in looks} <= {*KINDS}
        assert {color for _, color in looks} <= {*COLORS}
    assert min(crossed, left, back, grew, turned) >= 3


def test_what_is_asked_wrongly_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_films(tmp_path / "x", films=0, width=8, label_by="size")
    assert len(caught.value.problems) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").touch()
    with pytest.raises(UserError, match="something other than drawn films"):
        make_films(tmp_path / "mine", films=1, frames=1)
    make_films(tmp_path / "new", films=1, frames=1, width=64, height=64)
    make_films(tmp_path / "new", films=1, frames=2, width=64, height=64)
    assert len(digest(tmp_path / "new")) == 3
