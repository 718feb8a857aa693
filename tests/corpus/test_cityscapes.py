"""Cityscapes: leftImg8bit/ and gtFine/ (https://github.com/mcordts/cityscapesScripts)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.corpus.making import Thing, put, read, refusal, scene, sorted_things, things_of
from tests.corpus.test_mask_folders import drawn

NUMBERS = {"circle": 26_000, "rectangle": 24_003}  # car 0 and person 3
NAMES = {"circle": "car", "rectangle": "person"}


def cityscapes(
    folder: Path, split: str = "train", start: int = 0, labels: str = "ids", count: int = 6
) -> dict[str, list[Thing]]:
    made = {}
    for index in range(count):
        image, things = scene(start + index)
        city = ("aachen", "bonn")[index % 2]
        name = f"{city}_00000{index}_000019"
        put(folder / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", image)
        made[f"{name}_leftImg8bit.png"] = [(NAMES[t[0]], *t[1:]) for t in things]
        at = folder / f"gtFine/{split}/{city}/{name}_gtFine_"
        if labels == "ids":
            pixels = drawn(things, NUMBERS, np.uint16)
            pixels[pixels == 0] = 7  # road
            pixels[:3, :9] = 26  # a group of cars
            put(Path(f"{at}instanceIds.png"), Image.fromarray(pixels))
            put(Path(f"{at}labelIds.png"), Image.fromarray((pixels // 1000).astype(np.uint8)))
            put(Path(f"{at}color.png"), Image.new("RGB", (160, 120)))
        put(Path(f"{at}polygons.json"), polygons(things))
    return made


def polygons(things: list[Thing]) -> dict:
    objects = [{"label": "road", "polygon": [[0, 0], [160, 0], [160, 120], [0, 120]]}]
    objects += [
        {"label": NAMES[name], "polygon": [[x, y], [x + s, y], [x + s, y + s], [x, y + s]]}
        for name, x, y, s in things
    ]
    # panlabel 0.7.0, sample_valid.cityscapes.json: what was deleted stays in the file
    gone = [[90, 0], [160, 0], [160, 120], [90, 120]]
    objects.append({"label": "truck", "deleted": True, "polygon": gone})
    objects.append({"label": "cargroup", "polygon": [[0, 0], [9, 0], [9, 3], [0, 3]]})
    return {"imgWidth": 160, "imgHeight": 120, "objects": objects}


def without_groups(found, made) -> None:
    dataset = found.train
    crowds = {a.bbox_xywh for a in dataset.annotations if a.iscrowd}
    assert crowds == {(0, 0, 9, 3)}
    plain = tuple(a for a in dataset.annotations if not a.iscrowd)
    assert things_of(replace(dataset, annotations=plain)) == sorted_things(made)


@pytest.mark.parametrize("labels", ["ids", "polygons"])
def test_instances_of_every_city(tmp_path, labels):
    made = cityscapes(tmp_path, labels=labels)
    for city in ("aachen", "bonn"):
        for path in (tmp_path / "gtFine/train" / city).glob("*_polygons.json"):
            if labels == "ids":
                path.write_text("not read where there are ids")
    found = read(tmp_path)
    without_groups(found, made)
    assert "read as Cityscapes" in found.said
    assert "10 classes with instances" in found.said


def test_splits_and_the_test_set_without_labels(tmp_path):
    cityscapes(tmp_path)
    made = cityscapes(tmp_path, "val", start=50, count=3)
    cityscapes(tmp_path, "test", start=90, count=2)
    found = read(tmp_path)
    assert {split: len(d.images) for split, d in found.splits.items()} == {"train": 6, "valid": 3}
    assert {image.path.name for image in found.splits["valid"].images} == made.keys()


def test_a_polygon_hides_what_is_before_it(tmp_path):
    cityscapes(tmp_path, labels="polygons")
    path = next((tmp_path / "gtFine/train/aachen").glob("*.json"))
    objects = [
        {"label": "car", "polygon": [[10, 10], [60, 10], [60, 60], [10, 60]]},
        {"label": "person", "polygon": [[10, 10], [30, 10], [30, 60], [10, 60]]},
    ]
    put(path, {"imgWidth": 160, "imgHeight": 120, "objects": objects})
    found = read(tmp_path).train
    name = path.name.replace("_gtFine_polygons.json", "_leftImg8bit.png")
    image = next(image for image in found.images if image.path.name == name)
    boxes = {a.bbox_xywh for a in found.annotations_by_image[image.id]}
    assert boxes == {(30, 10, 30, 50), (10, 10, 20, 50)}


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ("{", "label file"),
        ([], "label file"),
        ({"objects": 3}, "label file"),
        ({"imgWidth": 8, "imgHeight": 8, "objects": []}, "other size"),
        ({"objects": [3]}, "polygon"),
        ({"objects": [{"label": "car"}]}, "polygon"),
        ({"objects": [{"label": "car", "polygon": [[1], 2]}]}, "polygon"),
        ({"objects": [{"label": "car", "polygon": [[1, 1], [2, 2]]}]}, "polygon"),
        ({"objects": [{"label": 3, "polygon": []}]}, "polygon"),
    ],
)
def test_bad_polygons(tmp_path, document, kind):
    cityscapes(tmp_path, labels="polygons")
    put(next((tmp_path / "gtFine/train/aachen").glob("*.json")), document)
    assert "would be left out" in refusal(tmp_path)
    assert read(tmp_path, max_drop=0.5).kinds[kind] >= 1


def test_partners_that_are_missing(tmp_path):
    cityscapes(tmp_path)
    next((tmp_path / "leftImg8bit/train/bonn").iterdir()).unlink()
    assert "_leftImg8bit.png in leftImg8bit/train/bonn" in refusal(tmp_path)
    assert read(tmp_path, max_drop=0.2).kinds["orphan"] == 1


def test_ids_of_another_size(tmp_path):
    cityscapes(tmp_path)
    path = next((tmp_path / "gtFine/train/bonn").glob("*instanceIds.png"))
    put(path, Image.new("L", (8, 8)))
    assert read(tmp_path, max_drop=0.2).kinds["other size"] == 1
