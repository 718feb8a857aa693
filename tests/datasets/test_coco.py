from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from app.datasets.coco import Category, read, write
from app.errors import UserError


def read_folder(folder):
    return read(folder / "_annotations.coco.json", [folder])


def test_polygon_and_rle_become_the_masks_drawn_by_hand(document, save):
    dataset = read_folder(save(document))
    square, run = np.zeros((2, 30, 40), dtype=np.uint8)
    square[5:15, 10:20] = 1
    run[2:5, 1] = run[2:5, 2] = 1  # counts run down the columns, 30 pixels each
    assert (coco_mask.decode(dataset.annotations[0].segmentation) == square).all()
    assert (coco_mask.decode(dataset.annotations[1].segmentation) == run).all()
    assert dataset.annotations[2].segmentation is None


def test_missing_fields_are_mended(document, save):
    for key in ("area", "iscrowd", "bbox"):
        del document["annotations"][0][key]
    first, second, third = read_folder(save(document)).annotations
    assert (first.bbox_xywh, first.area, first.iscrowd) == ((10, 5, 10, 10), 100, False)
    assert (second.bbox_xywh, second.area, second.iscrowd) == ((1, 2, 2, 3), 6, True)
    assert (third.bbox_xywh, third.area, third.iscrowd) == ((0, 0, 5, 6), 30, False)


def test_polygons_of_one_object_are_joined(document, save):
    other = [30, 20, 34, 20, 34, 24, 30, 24]
    document["annotations"][0].update(bbox=[10, 5, 24, 19])
    document["annotations"][0]["segmentation"].append(other)
    mask = coco_mask.decode(read_folder(save(document)).annotations[0].segmentation)
    assert mask.sum() == 100 + 16


def test_boxes_beyond_the_image_are_clipped(document, save):
    document["annotations"][2]["bbox"] = [35, -10, 100, 20]
    assert read_folder(save(document)).annotations[2].bbox_xywh == (35, 0, 5, 10)


def test_compressed_rle_is_kept_and_empty_runs_are_joined(document, save):
    mask = np.zeros((30, 40), dtype=np.uint8, order="F")
    mask[3:9, 5:30] = 1
    counts = coco_mask.encode(mask)["counts"].decode()
    document["annotations"][0]["segmentation"] = {"size": [30, 40], "counts": counts}
    document["annotations"][0]["bbox"] = [5, 3, 25, 6]
    # the same six pixels as the sound document's, in needlessly many runs
    padded = [0, 0, 32, 1, 0, 2, 27, 0, 0, 3, 1135, 0]
    document["annotations"][1]["segmentation"]["counts"] = padded
    first, second, _ = read_folder(save(document)).annotations
    assert first.segmentation == {"size": [30, 40], "counts": counts}
    joined = {"size": [30, 40], "counts": [32, 3, 27, 3, 1135]}
    assert second.segmentation["counts"].encode() == coco_mask.frPyObjects(joined, 30, 40)["counts"]


@pytest.mark.parametrize(
    "segmentation", [[[1.2, 1.2, 1.3, 1.2, 1.3, 1.3]], {"size": [30, 40], "counts": [1200]}]
)
def test_a_mask_without_pixels_is_a_problem(document, save, segmentation):
    document["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(UserError, match=r"annotations\[0\].*covers no pixel"):
        read_folder(save(document))


@pytest.mark.parametrize(
    "placeholder",
    [
        {"id": 0, "name": "animals"},
        {"id": 0, "name": "dog"},  # Roboflow: named as the project, which may be named as a class
        {"id": 9, "name": "animals"},
    ],
)
def test_placeholder_categories_are_dropped(document, save, placeholder):
    for category in document["categories"]:
        category["supercategory"] = "animals"
    document["categories"].insert(0, placeholder)
    dataset = read_folder(save(document))
    assert dataset.categories == (Category(3, "dog"), Category(4, "cat"))
    assert dataset.class_names == ["dog", "cat"]


def test_used_or_only_categories_are_kept(document, save):
    document["categories"] = [
        {"id": 0, "name": "dog", "supercategory": "dog"},
        {"id": 4, "name": "cat", "supercategory": "dog"},
        {"id": 5, "name": "unused", "supercategory": "unused"},
    ]
    for annotation in document["annotations"]:
        annotation["category_id"] = 0
    assert read_folder(save(document)).class_names == ["dog", "cat", "unused"]
    only = {**document, "annotations": [], "categories": document["categories"][:1]}
    assert read_folder(save(only, "only")).class_names == ["dog"]


def test_images_under_images_or_elsewhere_by_name(document, save):
    folder = save(document)
    (folder / "images").mkdir()
    (folder / "a.png").rename(folder / "images" / "a.png")
    document["images"][1]["file_name"] = "exported/from/b.png"
    (folder / "b.png").rename(folder / "images" / "b.png")
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    paths = [image.path for image in read_folder(folder).images]
    assert paths == [folder / "images" / "a.png", folder / "images" / "b.png"]
    assert all(path.is_absolute() for path in paths)


def test_problems_of_the_json_and_of_the_images_come_together(document, save):
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    folder = save(document)
    (folder / "b.png").unlink()
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    said = ("bbox", "no such file", "of 2 images would be", "of 3 annotations would be")
    assert len(caught.value.problems) == len(said)
    assert all(text in p for text, p in zip(said, caught.value.problems, strict=True))


def test_annotations_by_image_has_images_without_objects(document, save):
    document["annotations"] = document["annotations"][:2]
    dataset = read_folder(save(document))
    by_image = {key: [a.id for a in value] for key, value in dataset.annotations_by_image.items()}
    assert by_image == {1: [1, 2], 2: []}


def test_annotation_0_can_be_matched_by_pycocotools(document, save, tmp_path):
    for index, annotation in enumerate(document["annotations"]):
        annotation["id"] = index
    dataset = read_folder(save(document))
    assert [a.id for a in dataset.annotations] == [1, 2, 3]
    write(dataset, tmp_path / "out.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "out.json")
        found = [
            {"image_id": a.image_id, "category_id": a.category_id, "score": 1.0}
            | {"bbox": list(a.bbox_xywh)}
            for a in dataset.annotations
            if not a.iscrowd
        ]
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_written_json_is_strict_coco(document, save, tmp_path):
    folder = save(document)
    write(read_folder(folder), tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["images"][0] == {
        "id": 1,
        "file_name": str(folder / "a.png"),
        "width": 40,
        "height": 30,
    }
    for annotation in written["annotations"]:
        assert set(annotation) == {
            *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
        }
    assert written["annotations"][2]["segmentation"] == []
    assert written["annotations"][1]["iscrowd"] == 1
    assert written["categories"] == document["categories"]


def test_content_hash_follows_labels_and_images_not_the_folder(document, save, tmp_path):
    folder = save(document)
    original = read_folder(folder).content_hash()
    shutil.copytree(folder, tmp_path / "copy")
    assert read_folder(tmp_path / "copy").content_hash() == original
    document["annotations"][0]["bbox"][0] += 1
    assert read_folder(save(document, "moved box")).content_hash() != original
    Image.effect_noise((40, 30), 50).save(tmp_path / "copy" / "a.png")
    assert read_folder(tmp_path / "copy").content_hash() != original


def test_datasets_are_frozen(document, save):
    dataset = read_folder(save(document))
    with pytest.raises(FrozenInstanceError):
        dataset.images = ()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_broken_json_names_the_file(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"broken\.json"):
        read(path, [tmp_path])


def test_every_pothole_mask_fills_its_polygon(potholes):
    folder = potholes / "train"
    dataset = read_folder(folder)
    source = json.loads((folder / "_annotations.coco.json").read_text())["annotations"]
    assert (len(dataset.images), len(dataset.annotations)) == (80, 110)
    assert dataset.categories == (Category(0, "pothole"),)
    for annotation, entry in zip(dataset.annotations, source, strict=True):
        x, y = np.array(entry["segmentation"][0]).reshape(-1, 2).T
        shoelace = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
        assert coco_mask.area(annotation.segmentation) == pytest.approx(shoelace, rel=0.05, abs=60)
        x, y, w, h = entry["bbox"]  # Roboflow rounds x and y down, past the image's edge at times
        clipped = (x, y, min(w, 640 - x), min(h, 640 - y))
        assert annotation.bbox_xywh == pytest.approx(clipped)
