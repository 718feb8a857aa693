from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from app.config.compose import load_config
from app.config.reading import AS_WRITTEN
from app.config.schema import FormatName
from app.datasets.build import load_splits
from app.datasets.coco import Annotation, Category, Dataset, read
from app.datasets.coco import Image as DatasetImage
from app.datasets.formats import FORMATS, detect
from app.datasets.formats.outlines import ellipse_mask, polygon_mask
from app.datasets.formats.via import CSV_HEADER
from app.errors import UserError
from app.inference.yolo_labels import label_line, outline
from tests.helpers import REPOSITORY

WIDTH, HEIGHT = 40, 30


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), color: str = "black") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def text(path: Path, content: str | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def area(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    """The mask of columns x1..x2-1, rows y1..y2-1."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def pixels(annotation: Annotation) -> np.ndarray:
    return coco_mask.decode(annotation.segmentation).astype(bool)


def by_image(dataset: Dataset) -> dict[str, list[Annotation]]:
    return {image.path.name: dataset.annotations_by_image[image.id] for image in dataset.images}


def whole(folder: Path) -> Dataset:
    """The training split, before any is set aside from it."""
    found = detect(folder)
    assert found is not None
    return found.sources(folder, AS_WRITTEN)["train"].read().dataset


def problems(folder: Path) -> list[str]:
    """What is said of each faulty part, without how many of them there are."""
    with pytest.raises(UserError) as caught:
        load_splits(folder)
    return [line for line in caught.value.problems if "would be left out" not in line]


# --- YOLO -----------------------------------------------------------------------------------------


def yolo(folder: Path, config: str = "train: images/train\nval: images/val\n") -> Path:
    """A box (cat), a polygon (dog) and an image without a label file; one image in val."""
    text(folder / "data.yaml", config + "names: [cat, dog]\n")
    for name, color in (("train/a.png", "black"), ("train/b.png", "black"), ("val/c.png", "red")):
        picture(folder / "images" / name, color=color)
    # columns 10..19, rows 6..14: corners at 0.25, 0.5 of 40 and at 0.2, 0.5 of 30
    text(
        folder / "labels/train/a.txt",
        "0 0.375 0.5 0.25 0.2\n1 0.25 0.2 0.5 0.2 0.5 0.5 0.25 0.5\n\n",
    )
    text(folder / "labels/val/c.txt", "0 0.5 0.5 1 1\n")
    return folder


def test_yolo_boxes_polygons_and_images_without_objects(tmp_path):
    splits = load_splits(yolo(tmp_path))
    assert splits.notes == ("no COCO JSON: read as YOLO",)
    assert splits.train.categories == (Category(1, "cat"), Category(2, "dog"))
    objects = by_image(splits.train)
    box, polygon = objects["a.png"]
    assert (box.category_id, box.segmentation) == (1, None)
    assert box.bbox_xywh == pytest.approx((10, 12, 10, 6))
    assert box.area == pytest.approx(60)
    assert (polygon.category_id, polygon.bbox_xywh, polygon.area) == (2, (10, 6, 10, 9), 90)
    assert np.array_equal(pixels(polygon), area(10, 6, 20, 15))
    assert objects["b.png"] == []
    assert by_image(splits.valid)["c.png"][0].bbox_xywh == (0, 0, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "config",
    [
        "path: /elsewhere/set\ntrain: images/train\nval: images/val\n",
        "path: images\ntrain: [train]\nval: val\n",
        "train: ../images/train\nval: ../images/val\n",  # as Roboflow writes it
        "train: train.txt\nval: images/val\n",
    ],
)
def test_yolo_paths(tmp_path, config):
    text(tmp_path / "train.txt", "./images/train/a.png\nimages/train/b.png\n")
    splits = load_splits(yolo(tmp_path, config))
    assert (len(splits.train.images), len(splits.valid.images)) == (2, 1)


def test_yolo_names_by_number_and_labels_beside_the_images(tmp_path):
    text(tmp_path / "data.yaml", "train: train\nnames: {1: dog, 0: cat}\n")
    picture(tmp_path / "train/a.png")
    text(tmp_path / "train/a.txt", "1 0.5 0.5 0.5 0.5\n")
    dataset = whole(tmp_path)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.annotations[0].category_id == 2


def test_yolo_bad_lines_are_all_named(tmp_path):
    yolo(tmp_path)
    bad = [
        "2 0.5 0.5 0.5 0.5",
        "0 0.5 0.5 nan 0.5",
        "0 160 160 20 20",
        "0 0.1 0.1 0.2 0.2 0.3",
        "cat 0.5 0.5 0.5 0.5",
        "0 0.5 0.5 0 0.5",
        "1 0.2 0.2 0.2 0.2 0.2 0.2",
        "0",
    ]
    text(tmp_path / "labels/train/a.txt", "\n".join(bad))
    text(tmp_path / "labels/val/c.txt", "0 inf 0 0 0")
    lines = problems(tmp_path)
    for number in range(1, 1 + len(bad)):
        assert any(f"labels/train/a.txt line {number} " in line for line in lines), number
    assert any("labels/val/c.txt line 1 " in line for line in lines)
    assert len(lines) == len(bad) + 1


@pytest.mark.parametrize("sign", ["roboflow: {project: p}\n", "README.roboflow.txt"])
@pytest.mark.parametrize("prefix", ["../", "/content/cats-1/", "cats-1/"])
def test_yolo_as_roboflow_and_its_package_write_it(tmp_path, sign, prefix):
    """All three splits are named, wherever they were; only train is here."""
    picture(tmp_path / "train/images/a.png")
    text(tmp_path / "train/labels/a.txt", "0 0.5 0.5 0.5 0.5\n")
    lines = f"train: {prefix}train/images\nval: {prefix}valid/images\ntest: ../test/images\n"
    text(tmp_path / "data.yaml", f"{lines}names: [cat]\n")
    assert "'val'" in problems(tmp_path)[-2]  # not Roboflow's: taken at its word
    if sign.endswith(".txt"):
        (tmp_path / sign).touch()
    else:
        text(tmp_path / "data.yaml", f"{lines}names: [cat]\n{sign}")
    splits = load_splits(tmp_path)
    assert (len(splits.train.annotations), splits.test) == (1, None)
    assert "no validation split" in splits.notes[1]
    (tmp_path / "train").rename(tmp_path / "gone")
    assert "'train' is 'train/images': must be a folder" in problems(tmp_path)[0]


def test_yolo_bad_config(tmp_path):
    yolo(tmp_path, "train: ../../etc\nval: images/nowhere\n")
    assert ["'train'" in line or "'val'" in line for line in problems(tmp_path)][:2] == [True] * 2
    text(tmp_path / "data.yaml", "train: images/train\nnames: [no, cat, cat]\n")
    found = problems(tmp_path)
    assert "names[0]" in found[0]
    assert "names[2]" in found[1]
    for broken in ("names: [", "- 1", "names: {0: cat, 2: dog}\ntrain: images/train", ""):
        text(tmp_path / "data.yaml", broken)
        assert "data.yaml" in problems(tmp_path)[0]


def test_links_out_of_the_dataset_are_refused(tmp_path):
    folder = yolo(tmp_path / "set")
    picture(tmp_path / "secret.png")
    text(tmp_path / "secret.txt", "0 0.5 0.5 0.5 0.5")
    (folder / "images/train/d.png").symlink_to(tmp_path / "secret.png")
    (folder / "labels/train/b.txt").symlink_to(tmp_path / "secret.txt")
    found = problems(folder)
    assert len(found) == 2
    assert all("leads out of the dataset's folder" in line for line in found)


# --- the way out for YOLO -------------------------------------------------------------------------


def test_yolo_keeps_holes_and_parts_to_the_pixel(tmp_path):
    ring = area(2, 3, 20, 25) & ~area(5, 6, 9, 10) & ~area(12, 8, 18, 20)
    island = area(14, 10, 16, 12)  # inside the hole
    apart = area(30, 1, 40, 30) & ~area(35, 29, 36, 30)
    corners = np.zeros((HEIGHT, WIDTH), dtype=bool)
    corners[[20, 21], [24, 25]] = True  # pixels that touch at a corner
    mask = ring | island | apart | corners
    noise = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5
    picture(tmp_path / "x.png")
    image = DatasetImage(7, tmp_path / "x.png", WIDTH, HEIGHT)
    annotations = tuple(
        Annotation(i, 7, 3, (0, 0, 1, 1), encoded(m), 1.0, False)
        for i, m in enumerate((mask, noise), start=1)
    )
    box = Annotation(3, 7, 3, (4, 5, 6, 7), None, 42.0, False)
    crowd = Annotation(4, 7, 3, (4, 5, 6, 7), None, 42.0, True)
    dataset = Dataset((image,), (*annotations, box, crowd), (Category(3, "thing"),))
    label(dataset, tmp_path / "yolo")
    back = whole(tmp_path / "yolo")
    assert back.class_names == ["thing"]
    assert len(back.annotations) == 3
    assert np.array_equal(pixels(back.annotations[0]), mask)
    assert np.array_equal(pixels(back.annotations[1]), noise)
    assert back.annotations[2].bbox_xywh == pytest.approx((4, 5, 6, 7), abs=1e-4)


def label(dataset: Dataset, folder: Path, split: str = "train") -> None:
    """Write a split as Ultralytics lays it out; crowds have no line."""
    numbers = {category.id: index for index, category in enumerate(dataset.categories)}
    splits = {split: f"images/{split}"}
    if (folder / "data.yaml").is_file():
        splits |= yaml.safe_load((folder / "data.yaml").read_text())
    text(folder / "data.yaml", json.dumps({**splits, "names": dataset.class_names}))
    (folder / "images" / split).mkdir(parents=True)
    for image in dataset.images:
        shutil.copyfile(image.path, folder / "images" / split / image.path.name)
        lines = [
            label_line(
                *(numbers[a.category_id], a.segmentation, a.bbox_xywh), image.width, image.height
            )
            for a in dataset.annotations_by_image[image.id]
            if not a.iscrowd
        ]
        text(folder / "labels" / split / f"{image.path.stem}.txt", "".join(lines))


def encoded(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_the_outline_of_a_rectangle_is_its_corners():
    corners = outline(encoded(area(3, 4, 10, 20)))
    assert sorted(map(tuple, corners.tolist())) == [(3, 4), (3, 20), (10, 4), (10, 20)]


def test_potholes_to_yolo_and_back(potholes, tmp_path):
    before = load_splits(potholes)
    assert before.test is not None
    for name, dataset in (("train", before.train), ("val", before.valid), ("test", before.test)):
        label(dataset, tmp_path, name)
    after = load_splits(tmp_path)
    assert after.test is not None
    ious = []
    for old, new in zip(
        (before.train, before.valid, before.test),
        (after.train, after.valid, after.test),
        strict=True,
    ):
        assert new.class_names == old.class_names
        found = by_image(new)
        for name, objects in by_image(old).items():
            for one, other in zip(objects, found[name], strict=True):
                ious.append(coco_mask.iou([one.segmentation], [other.segmentation], [0])[0, 0])
    assert len(ious) == 120
    assert np.mean(ious) >= 0.98
    assert min(ious) >= 0.98


# --- LabelMe --------------------------------------------------------------------------------------


def shape(label: str, points: list, kind: str = "polygon", group: int | None = None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group}


def labelme(folder: Path, shapes: list, name: str = "a", **more: object) -> Path:
    picture(folder / f"{name}.png")
    document = {"imagePath": f"{name}.png", "imageData": "AAAA", "shapes": shapes, **more}
    text(folder / f"{name}.json", document)
    return folder


def test_labelme_shapes_and_groups(tmp_path):
    square = [[10, 5], [20, 5], [20, 15], [10, 15]]
    labelme(
        tmp_path,
        [
            shape("dog", square, group=1),
            shape("cat", [[8, 9], [2, 4]], "rectangle"),
            shape("dog", [[30, 20], [35, 25]], "rectangle", group=1),
            shape("sun", [[20, 15], [20, 18]], "circle"),
        ],
        imageWidth=WIDTH,
        imageHeight=HEIGHT,
    )
    labelme(tmp_path, [], "empty")
    dataset = whole(tmp_path)
    assert dataset.class_names == ["cat", "dog", "sun"]
    dog, cat, sun = by_image(dataset)["a.png"]
    assert np.array_equal(pixels(dog), area(10, 5, 20, 15) | area(30, 20, 35, 25))
    assert (dog.category_id, dog.bbox_xywh, dog.area) == (2, (10, 5, 25, 20), 125)
    assert (cat.category_id, cat.bbox_xywh, cat.segmentation) == (1, (2, 4, 6, 5), None)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert np.array_equal(pixels(sun), np.hypot(columns - 20, rows - 15) <= 3)
    assert by_image(dataset)["empty.png"] == []
    assert load_splits(tmp_path).notes[0] == "no COCO JSON: read as LabelMe"


def test_one_labelme_file_and_split_folders(tmp_path):
    square = [[10, 5], [20, 5], [20, 15], [10, 15]]
    labelme(tmp_path / "set/train", [shape("dog", square)])
    labelme(tmp_path / "set/val", [shape("dog", square)])
    splits = load_splits(tmp_path / "set")
    assert (len(splits.train.annotations), len(splits.valid.annotations)) == (1, 1)
    assert "one training image" in load_splits(tmp_path / "set/train").notes[1]


def test_labelme_bad_input(tmp_path):
    square = [[10, 5], [20, 5], [20, 15], [10, 15]]
    labelme(
        tmp_path,
        [
            shape("dog", [[0, 0], [math.nan, 5], [3, 3]]),
            shape("dog", [[0, 0], [5, 5]]),
            shape("dog", [[0, 0], [1e9, 5], [3, 3]]),
            shape("", square),
            shape("dog", [[1, 1]], "point"),
            shape("dog", [[1, 1], [1, 1]], "circle"),
            shape("dog", [[50, 40], [60, 40], [60, 50]]),
            shape("dog", "x"),
            "shape",
        ],
    )
    labelme(tmp_path, [], "b", imageWidth=99)
    labelme(tmp_path, [], "c", imagePath="../../secret.png")
    (tmp_path / "c.png").unlink()
    labelme(tmp_path, [], "d", imagePath=None)
    text(tmp_path / "e.json", '{"shapes": [')
    text(tmp_path / "f.json", {"imagePath": "a.png"})
    found = problems(tmp_path)
    for index in range(9):
        assert any(f"a.json: shapes[{index}]" in line for line in found), index
    for name in "bcdef":
        assert any(f"{name}.json" in line for line in found), name
    assert len(found) == 14


def test_labelme_image_outside_the_folder(tmp_path):
    picture(tmp_path / "secret.png")
    labelme(tmp_path / "set", [], imagePath="..\\secret.png", imageData=None)
    (tmp_path / "set/a.png").unlink()
    assert "no such file" in problems(tmp_path / "set")[0]


# --- Pascal VOC -----------------------------------------------------------------------------------


def voc(folder: Path, *boxes: tuple[str, object, object, object, object], name: str = "a") -> Path:
    """Objects of name, xmin, ymin, xmax, ymax."""
    picture(folder / "JPEGImages" / f"{name}.png")
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    body = f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
    text(folder / "Annotations" / f"{name}.xml", body)
    return folder


def test_voc_boxes_and_masks(tmp_path):
    voc(tmp_path, ("dog", 11, 6, 20, 15), ("cat", 1, 1, WIDTH, HEIGHT))
    numbers = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    dog = area(10, 5, 20, 15) & ~area(12, 8, 14, 10)
    numbers[area(9, 4, 21, 16)] = 255
    numbers[area(10, 5, 20, 15)] = 0
    numbers[dog] = 1
    (tmp_path / "SegmentationObject").mkdir()
    png = Image.fromarray(numbers, "P")
    png.putpalette(bytes(range(256)) * 3)  # all 256: Pillow saves fewer in fewer bits
    png.save(tmp_path / "SegmentationObject/a.png")
    dataset = whole(tmp_path)
    assert dataset.class_names == ["cat", "dog"]
    first, second = dataset.annotations
    assert np.array_equal(pixels(first), dog)
    assert (first.category_id, first.bbox_xywh) == (2, (10, 5, 10, 10))
    assert (second.bbox_xywh, second.segmentation) == ((0, 0, WIDTH, HEIGHT), None)
    assert load_splits(tmp_path).notes[0] == "no COCO JSON: read as Pascal VOC"


def test_voc_bad_input(tmp_path):
    voc(tmp_path, ("dog", "x", 6, 20, 15), ("dog", 20, 6, 10, 15), ("", 1, 1, 5, 5))
    voc(tmp_path, ("dog", 1, 1, 5, 5), name="b")
    numbers = np.full((HEIGHT, WIDTH), 2, dtype=np.uint8)
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(numbers).save(tmp_path / "SegmentationObject/b.png")
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]><annotation><filename>a.png</filename></annotation>'
    text(tmp_path / "Annotations/c.xml", bomb)
    (tmp_path / "Annotations/d.xml").write_bytes(
        f'<?xml version="1.0" encoding="UTF-16"?>{bomb}'.encode("utf-16")
    )
    text(tmp_path / "Annotations/e.xml", "<annotation>")
    text(
        tmp_path / "Annotations/f.xml",
        "<annotation><filename>../../x.png</filename></annotation>",
    )
    text(tmp_path / "Annotations/g.xml", "<annotation><filename>g.png</filename></annotation>")
    voc(tmp_path, name="h")
    picture(tmp_path / "JPEGImages/h.png", (12, 12))
    found = problems(tmp_path)
    assert sum("DOCTYPE" in line for line in found) == 2
    for part in ("object[0]", "object[1]", "object[2]", "b.png's number", "e.xml", "f.xml"):
        assert any(part in line for line in found), part
    assert any("g.xml" in line and "no such file" in line for line in found)
    assert any("h.xml: size" in line for line in found)
    assert len(found) == 10


# --- mask PNGs ------------------------------------------------------------------------------------


def test_masks_of_object_numbers(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "images" / name)
    numbers = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    ring = area(2, 3, 12, 13) & ~area(5, 5, 8, 8)
    parts = area(20, 20, 25, 25) | area(30, 1, 31, 2)
    numbers[ring], numbers[parts] = 7, 1000
    (tmp_path / "masks/dog").mkdir(parents=True)
    Image.fromarray(numbers).save(tmp_path / "masks/a.png")
    Image.fromarray(ring).save(tmp_path / "masks/dog/a.png")  # 1 bit
    dataset = whole(tmp_path)
    assert dataset.class_names == ["dog", "object"]
    objects = {(a.category_id, int(a.area)): a for a in by_image(dataset)["a.jpg"]}
    assert objects.keys() == {(2, 91), (2, 26), (1, 91)}
    assert np.array_equal(pixels(objects[2, 91]), ring)
    assert np.array_equal(pixels(objects[1, 91]), ring)
    assert np.array_equal(pixels(objects[2, 26]), parts)
    assert objects[2, 26].bbox_xywh == (20, 1, 11, 24)
    assert by_image(dataset)["b.jpg"] == []
    assert load_splits(tmp_path).notes[0] == "no COCO JSON: read as mask PNGs"


def test_masks_bad_input(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / "images" / f"{name}.png")
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "#c81e1e").save(tmp_path / "masks/a.png")
    (tmp_path / "masks/b.png").write_bytes(b"no image")
    Image.new("L", (5, 6), 1).save(tmp_path / "masks/c.png")
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "masks/d.png")
    found = problems(tmp_path)
    for name, fault in (
        ("a", "holds colours"),
        ("b", "cannot be read"),
        ("c", "has 5 x 6"),
        ("d", "has no image"),
    ):
        assert any(f"masks/{name}.png" in line and fault in line for line in found), name
    assert len(found) == 4


# --- VGG Image Annotator --------------------------------------------------------------------------


def via(folder: Path, regions: object, project: bool = False, name: str = "a.png") -> Path:
    picture(folder / "a.png")
    entries = {f"{name}123": {"filename": name, "size": 123, "regions": regions}}
    document = {"_via_settings": {}, "_via_img_metadata": entries} if project else entries
    text(folder / ("project.json" if project else "via_region_data.json"), document)
    return folder


def region(label: object, **shape: object) -> dict:
    return {"shape_attributes": shape, "region_attributes": {"kind": label}}


@pytest.mark.parametrize("project", [False, True])
def test_via_shapes(tmp_path, project):
    regions = [
        region("dog", name="polygon", all_points_x=[10, 20, 20, 10], all_points_y=[5, 5, 15, 15]),
        region({"cat": True, "dog": False}, name="rect", x=2, y=3, width=4, height=5),
        region("dog", name="circle", cx=20, cy=15, r=3),
        region("dog", name="ellipse", cx=20, cy=15, rx=9, ry=3, theta=math.pi / 2),
    ]
    listed: object = regions if project else {str(i): r for i, r in enumerate(regions)}
    dataset = whole(via(tmp_path, listed, project))
    assert dataset.class_names == ["cat", "dog"]
    polygon, rect, circle, ellipse = dataset.annotations
    assert np.array_equal(pixels(polygon), area(10, 5, 20, 15))
    assert (rect.category_id, rect.bbox_xywh, rect.segmentation) == (1, (2, 3, 4, 5), None)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert np.array_equal(pixels(circle), np.hypot(columns - 20, rows - 15) <= 3)
    upright = np.hypot((columns - 20) / 3, (rows - 15) / 9) <= 1
    assert np.array_equal(pixels(ellipse), upright)
    assert load_splits(tmp_path).notes[0] == "no COCO JSON: read as VGG Image Annotator"


def via_csv(folder: Path, *rows: tuple[str, object, object], header: str = "filename") -> Path:
    picture(folder / "a.png")
    picture(folder / "images" / "b.png")
    with (folder / "via_export_csv.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([header, *CSV_HEADER[1:]])
        for index, (name, shape, attributes) in enumerate(rows):
            cells = [shape, attributes]
            texts = [c if isinstance(c, str) else json.dumps(c) for c in cells]
            table.writerow([name, 123, "{}", len(rows), index, *texts])
    return folder


@pytest.mark.parametrize("header", ["filename", "#filename"])
def test_via_csv_reads_as_its_json_does(tmp_path, header):
    polygon = {"name": "polygon", "all_points_x": [10, 20, 20], "all_points_y": [5, 5, 15]}
    rect = {"name": "rect", "x": 2, "y": 3, "width": 4, "height": 5}
    folder = via_csv(
        tmp_path / "csv",
        ("a.png", polygon, {"kind": "dog"}),
        ("b.png", {}, {}),
        ("a.png", rect, {"kind": "cat, or\nso"}),
        header=header,
    )
    dataset = whole(folder)
    regions = [region("dog", **polygon), region("cat, or\nso", **rect)]
    assert dataset.annotations == whole(via(tmp_path / "json", regions)).annotations
    assert dataset.class_names == ["cat, or\nso", "dog"]
    assert {name: len(found) for name, found in by_image(dataset).items()} == {
        **{"a.png": 2, "b.png": 0}
    }
    assert load_splits(folder).notes[0] == "no COCO JSON: read as VGG Image Annotator"


def test_via_csv_bad_input(tmp_path):
    rect = {"name": "rect", "x": 2, "y": 3, "width": 4, "height": 5}
    folder = via_csv(
        tmp_path,
        ("a.png", '{"name": "re', {"kind": "dog"}),
        ("a.png", rect, {"kind": ""}),
        ("c.png", rect, {"kind": "dog"}),
        ("b.png", [1], {"kind": "dog"}),
    )
    with (folder / "via_export_csv.csv").open("a") as file:
        file.write("a.png,1\n" + "x" * 200_000 + "\n")
    said = ["line 2 ", "a.png: regions[0].kind", "c.png", "b.png: regions[0]", "line 6 ", "line 7 "]
    found = problems(folder)
    for part in said:
        assert any(part in line for line in found), part
    assert len(found) == len(said)


def test_via_bad_input(tmp_path):
    regions = [
        region("dog", name="polygon", all_points_x=[10, 20], all_points_y=[5, 5, 15]),
        region("dog", name="polygon", all_points_x=[10, math.inf, 1], all_points_y=[5, 5, 15]),
        region("dog", name="circle", cx=20, cy=None, r=3),
        region("dog", name="circle", cx=200, cy=5, r=3),
        region("dog", name="point", cx=20, cy=3),
        region("", name="circle", cx=20, cy=5, r=3),
        region("dog", name="rect", x=1, y=1, width=-4, height="x"),
        "region",
    ]
    found = problems(via(tmp_path / "regions", regions))
    for index in range(len(regions)):
        assert any(f"a.png: regions[{index}]" in line for line in found), index
    assert len(found) == len(regions)
    assert "no such file" in problems(via(tmp_path / "out", [], name="../b.png"))[0]
    regions = [region("dog", name="rect", x=1, y=1, width=4, height=4)]
    regions[0]["region_attributes"]["colour"] = "red"
    assert "colour, kind" in problems(via(tmp_path / "two", regions))[0]


# --- COCO in CVAT's layout ------------------------------------------------------------------------


def coco_file(path: Path, name: str, category: str = "dog") -> None:
    """As CVAT writes it: one object in one image."""
    keys = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10.0, 5.0, 10.0, 10.0]}
    mask = {"segmentation": [[10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]], "area": 100.0}
    size = {"width": WIDTH, "height": HEIGHT, "license": 0, "coco_url": "", "date_captured": 0}
    document = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": ""},
        "categories": [{"id": 1, "name": category, "supercategory": ""}],
        "images": [{"id": 1, "file_name": name, **size}],
        "annotations": [{**keys, **mask, "iscrowd": 0, "attributes": {"occluded": False}}],
    }
    text(path, document)


@pytest.mark.parametrize("place", ["images/a.png", "images/default/a.png"])
def test_cvat_exports_one_subset(tmp_path, place):
    picture(tmp_path / place)
    coco_file(tmp_path / "annotations/instances_default.json", "a.png")
    splits = load_splits(tmp_path)
    assert splits.train.class_names == ["dog"]
    assert np.array_equal(pixels(splits.train.annotations[0]), area(10, 5, 20, 15))
    assert not any("read as" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("subsets", "folder"),
    [
        ({"Train": "train", "Validation": "valid", "Test": "test"}, "images/{}"),
        ({"train2017": "train", "val2017": "valid"}, "{}"),
        ({"default": "train", "val": "valid"}, "images/{}"),
    ],
)
def test_subsets_are_told_by_the_names_of_their_files(tmp_path, subsets, folder):
    """Each has an image of the same name, in a folder of its own."""
    for subset, split in subsets.items():
        picture(tmp_path / folder.format(subset) / "frame_000000.png")
        coco_file(tmp_path / f"annotations/instances_{subset}.json", "frame_000000.png", split)
    splits = load_splits(tmp_path)
    found = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    for subset, split in subsets.items():
        dataset = found[split]
        assert [i.path.parent.name for i in dataset.images] == [subset]
        names = {c.id: c.name for c in dataset.categories}
        assert [names[a.category_id] for a in dataset.annotations] == [split]


def test_subsets_that_are_no_splits(tmp_path):
    for subset in ("train", "default", "val", "night"):
        picture(tmp_path / "images" / subset / "a.png")
        coco_file(tmp_path / f"annotations/instances_{subset}.json", "a.png")
    found = problems(tmp_path)
    assert len(found) == 2
    assert "instances_night.json: must have train, val or test in its name" in found[0]
    assert "instances_train.json: is for train, as instances_default.json is" in found[1]
    for subset in ("train", "default", "night"):
        (tmp_path / f"annotations/instances_{subset}.json").unlink()
    assert whole(tmp_path).class_names == ["dog"]  # one alone is to train on
    coco_file(tmp_path / "annotations/instances_test.json", "a.png")
    assert "no instances_train.json to train on" in problems(tmp_path)[0]


# --- detection and outlines -----------------------------------------------------------------------


def test_coco_comes_first(save, document):
    folder = save(document)
    yolo(folder)
    (folder / "_annotations.coco.json").rename(folder / "labels.json")
    splits = load_splits(folder)
    assert set(splits.train.class_names) == {"dog", "cat"}
    assert not any("read as" in note for note in splits.notes)
    images = {i.path.name for s in (splits.train, splits.valid) for i in s.images}
    assert images == {"a.png", "b.png"}


def test_the_rules_of_splits_hold_and_what_is_read_can_be_written(tmp_path):
    folder = yolo(tmp_path / "set", "train: images\n")
    splits = load_splits(folder, limit=1, valid_fraction=0.3, seed=1)
    assert len(splits.train.images) == 1
    assert splits.notes[1].startswith("no validation split: 1 of 3")
    text(tmp_path / "set.json", whole(folder).to_json())
    document = json.loads((tmp_path / "set.json").read_text())
    for image in document["images"]:
        image["file_name"] = str(Path(image["file_name"]).relative_to(tmp_path.resolve()))
    text(tmp_path / "set.json", document)
    assert read(tmp_path / "set.json", [tmp_path]) == whole(folder)


def test_the_format_can_be_decided_by_hand(save, document):
    folder = save(document)
    yolo(folder)
    splits = load_splits(folder, format="yolo")
    assert splits.train.categories == (Category(1, "cat"), Category(2, "dog"))
    assert splits.notes == ("read as YOLO, as dataset.format says",)
    assert load_splits(folder, format="coco").notes[0] == "read as COCO, as dataset.format says"
    with pytest.raises(UserError) as caught:
        load_splits(folder, format="voc")
    assert "Looked for Pascal VOC (Annotations/*.xml and JPEGImages/). There is: " in str(
        caught.value
    )
    assert "YOLO" not in str(caught.value)
    assert str(caught.value).endswith("It looks like coco")


def test_a_format_that_there_is_not(tmp_path):
    with pytest.raises(
        UserError, match=r"'yolov8': there are auto, .*coco, .* Did you mean 'yolo'\?"
    ):
        load_splits(tmp_path, format="yolov8")
    with pytest.raises(UserError, match=r"dataset\.format: .*'masks'"):
        load_config(["dataset.format=yolov8"])
    assert {*get_args(FormatName)} == {"auto", *(format.key for format in FORMATS)}


def test_the_page_of_data_has_every_format():
    keys = re.findall(r"^\|[^|]*\| `([a-z-]+)` \|", (REPOSITORY / "docs/data.md").read_text(), re.M)
    assert {*keys} == {format.key for format in FORMATS}


def test_an_unknown_folder_is_told_what_is_understood(tmp_path):
    (tmp_path / "notes.txt").touch()
    line = problems(tmp_path)[0]
    for name in ("YOLO", "LabelMe", "Pascal VOC", "mask PNGs", "VGG Image Annotator", "notes.txt"):
        assert name in line


def test_polygons_are_cut_off_at_the_image():
    triangle = [-10, 10, 20, -20, 20, 40]  # crosses the left, upper and lower sides
    mask = coco_mask.decode(polygon_mask(triangle, WIDTH, HEIGHT)).astype(bool)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = (columns < 20) & (np.abs(rows - 10) < columns + 10)
    assert (mask != inside).mean() < 0.02
    assert mask[:, 20:].sum() == 0
    for bad in ([0, 0, 1e300, 5, 3, 3], [1, 2], [50, 40, 60, 40, 60, 50], None, [0] * 6):
        with pytest.raises(ValueError, match=r".+"):
            polygon_mask(bad, WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="covers no pixel"):
        ellipse_mask((100, 5), (3, 3), WIDTH, HEIGHT)
