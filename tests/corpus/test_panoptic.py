"""COCO panoptic: panoptic_<split>.json and PNGs (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.corpus.making import (
    Thing,
    coco,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)
from tests.corpus.test_mask_folders import drawn

CATEGORIES = [
    {"id": 7, "name": "circle", "isthing": 1},
    {"id": 9, "name": "rectangle", "isthing": 1},
    {"id": 40, "name": "sky", "isthing": 0},
]
IDS = {"circle": 3, "rectangle": 70_001}  # one in red alone, one in all three colours
SKY = 300


def colors(ids: np.ndarray) -> Image.Image:
    pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def panoptic(
    folder: Path,
    subset: str = "train",
    images: str = "images",
    annotations: str = ".",
    *,
    sky: bool = False,
    start: int = 0,
    crowd: bool = False,
) -> tuple[dict[str, list[Thing]], dict[str, Any]]:
    made = scenes(folder, 6, images, "jpg", start)
    document: dict[str, Any] = {
        "images": [
            {"id": id, "file_name": name, "width": 160, "height": 120}
            for id, name in enumerate(made, start=1)
        ],
        "annotations": [],
        "categories": copy.deepcopy(CATEGORIES),
    }
    for id, (name, things) in enumerate(made.items(), start=1):
        ids = drawn(things, IDS, np.int32)
        segments = [
            {"id": 3, "category_id": 7, "iscrowd": int(crowd), "bbox": [], "area": 1},
            {"id": 70_001, "category_id": 9, "iscrowd": 0, "bbox": [], "area": 1},
        ]
        if sky:
            ids[:5, :20] = ids[:5, 100:] = SKY
            segments.append({"id": SKY, "category_id": 40, "iscrowd": 0})
        mask = f"{Path(name).stem}.png"
        put(folder / annotations / f"panoptic_{subset}" / mask, colors(ids))
        document["annotations"].append(
            {"image_id": id, "file_name": mask, "segments_info": segments}
        )
    put(folder / annotations / f"panoptic_{subset}.json", document)
    return made, document


def test_things_by_the_ids_of_their_colours(tmp_path):
    made, _ = panoptic(tmp_path)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert mask_iou(found.train, made) == 1
    assert "read as COCO panoptic" in found.said


# As COCO 2017 lies: train2017/, annotations/panoptic_train2017.json and its folder
def test_the_layout_of_coco(tmp_path):
    made = {}
    for subset, start in (("train2017", 0), ("val2017", 50)):
        made[subset], _ = panoptic(tmp_path, subset, subset, "annotations", start=start)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train2017"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val2017"])


def test_stuff_is_an_object_for_each_piece(tmp_path):
    made, _ = panoptic(tmp_path, sky=True)
    found = read(tmp_path).train
    sky = next(category.id for category in found.categories if category.name == "sky")
    boxes = {a.bbox_xywh for a in found.annotations if a.category_id == sky}
    assert len(found.annotations) >= 12 + 12 - 2
    assert (0, 0, 20, 5) in boxes
    assert (100, 0, 60, 5) in boxes
    assert len(made) == 6


def test_crowds_stay_crowds(tmp_path):
    panoptic(tmp_path, crowd=True)
    found = read(tmp_path)
    assert sum(a.iscrowd for a in found.train.annotations) == 6
    assert "6 of 12 objects are crowds" in found.said
    assert not any(a.iscrowd for a in read(tmp_path, crowd="instances").train.annotations)


def test_instances_are_read_first(tmp_path):
    panoptic(tmp_path, annotations="annotations")
    put(tmp_path / "annotations/instances_train.json", {"images": [], "annotations": []})
    assert "COCO panoptic" not in refusal(tmp_path)


def test_images_are_found_by_the_masks_name_without_a_list(tmp_path):
    made, document = panoptic(tmp_path)
    del document["images"]
    put(tmp_path / "panoptic_train.json", document)
    (tmp_path / "images").rename(tmp_path / "train")
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_gray_and_palette_pngs(tmp_path):
    """An image of ids below 256 in red alone is red, of one id in all three channels gray."""
    made, document = panoptic(tmp_path)
    things = made["img_0.jpg"]
    gray = 5 | 5 << 8 | 5 << 16
    ids = drawn([t for t in things if t[0] == "circle"], {"circle": gray}, np.int32)
    put(tmp_path / "panoptic_train/img_0.png", colors(ids))
    document["annotations"][0]["segments_info"] = [{"id": gray, "category_id": 7, "iscrowd": 0}]
    put(tmp_path / "panoptic_train.json", document)
    made["img_0.jpg"] = [t for t in things if t[0] == "circle"]
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("id", 4, "segmentation"),
        ("id", None, "segmentation"),
        ("id", 2**70, "segmentation"),
        ("category_id", 8, "category reference"),
        ("category_id", [], "category reference"),
        ("iscrowd", 2, "iscrowd"),
    ],
)
def test_bad_segments_are_left_out(tmp_path, key, value, kind):
    _, document = panoptic(tmp_path)
    document["annotations"][0]["segments_info"][0][key] = value
    put(tmp_path / "panoptic_train.json", document)
    assert "1 of 12 annotations would be left out" in refusal(tmp_path)
    found = read(tmp_path, max_drop=0.1)
    assert found.kinds[kind] == 1
    assert len(found.train.annotations) == 11


def test_segments_that_the_json_lacks_are_left_out_and_said(tmp_path):
    _, document = panoptic(tmp_path)
    document["annotations"][0]["segments_info"].pop()
    put(tmp_path / "panoptic_train.json", document)
    found = read(tmp_path)
    assert found.kinds["void"] == 1
    assert "1 segments that 'segments_info' lacks (70001)" in found.said


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(file_name="../../secret.png"),
        lambda a: a.update(file_name=None),
        lambda a: a.update(file_name="gone.png"),
        lambda a: a.update(segments_info=None),
        lambda a: a.update(image_id=99, file_name="gone.png"),
    ],
)
def test_bad_entries_leave_their_image_out(tmp_path, change):
    _, document = panoptic(tmp_path / "set")
    put(tmp_path / "secret.png", Image.new("RGB", (160, 120), (3, 0, 0)))
    change(document["annotations"][0])
    put(tmp_path / "set/panoptic_train.json", document)
    assert "1 of 6 images would be left out" in refusal(tmp_path / "set")
    assert len(read(tmp_path / "set", max_drop=0.2).train.images) == 5


def test_pngs_of_another_size_or_broken(tmp_path):
    panoptic(tmp_path)
    put(tmp_path / "panoptic_train/img_0.png", Image.new("RGB", (16, 12)))
    put(tmp_path / "panoptic_train/img_1.png", b"no image")
    found = read(tmp_path, max_drop=0.4)
    assert len(found.train.images) == 4
    assert found.kinds["other size"] == 1


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "must be a JSON object"),
        ({}, "must have the lists 'annotations' and 'categories'"),
        ("{", "JSON"),
        ({"annotations": [3], "categories": []}, "must be an object with 'segments_info'"),
        ({"annotations": [], "categories": [{"id": 1}, 3]}, "must be the class's name"),
    ],
)
def test_documents_that_are_none(tmp_path, document, said):
    panoptic(tmp_path)
    put(tmp_path / "panoptic_train.json", document)
    assert said in refusal(tmp_path)


def test_names_of_no_split_and_of_one_twice(tmp_path):
    for subset, start in (("train", 0), ("day", 50)):
        panoptic(tmp_path, subset, start=start)
    assert "panoptic_day.json: must be panoptic_train.json" in refusal(tmp_path)
    (tmp_path / "panoptic_day.json").rename(tmp_path / "panoptic_train2017.json")
    assert "is for train, as" in refusal(tmp_path)


# labelbox 7.17.0, tests/integration/.../coco: instances.json, panoptic.json, images/ and masks/
def plainly_named(folder: Path, masks: str = "masks", **more: Any) -> dict[str, list[Thing]]:
    made, _ = panoptic(folder, **more)
    (folder / "panoptic_train").rename(folder / masks)
    (folder / "panoptic_train.json").rename(folder / "panoptic.json")
    return made


@pytest.mark.parametrize("masks", ["masks", "annotations/pngs", "panoptic"])
def test_pngs_in_a_folder_of_another_name(tmp_path, masks):
    (tmp_path / "annotations").mkdir()
    made = plainly_named(tmp_path, masks)
    put(tmp_path / "instances.json", coco(made))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as COCO panoptic; not read beside it: instances.json (COCO)" in found.said


def test_images_that_are_pngs_of_the_masks_names(tmp_path):
    made = plainly_named(tmp_path)
    document = json.loads((tmp_path / "panoptic.json").read_text())
    for image in document["images"]:
        path = tmp_path / "images" / image["file_name"]
        image["file_name"] = f"{path.stem}.png"
        put(path.with_suffix(".png"), Image.open(path))
        path.unlink()
    put(tmp_path / "panoptic.json", document)
    wanted = {name.replace("jpg", "png"): things for name, things in made.items()}
    assert things_of(read(tmp_path).train) == sorted_things(wanted)


def test_without_its_pngs_the_objects_of_coco_are_read_and_that_is_said(tmp_path):
    made = plainly_named(tmp_path)
    put(tmp_path / "instances.json", coco(made))
    shutil.rmtree(tmp_path / "masks")
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "not read beside COCO's objects: panoptic.json (COCO panoptic), whose PNGs" in found.said
    (tmp_path / "instances.json").unlink()
    assert "no such file" in refusal(tmp_path)
