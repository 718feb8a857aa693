"""YOLO as its tools lay it out, with a data.yaml and without (FAULTS 9; CVAT's: test_cvat)."""

from __future__ import annotations

import pytest

from tests.corpus.making import (
    CLASSES,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
    yolo,
)

NAMES = "\n".join(CLASSES) + "\n"


# labelImg and Make Sense: the texts and classes.txt beside the images
@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "predefined_classes.txt"])
def test_all_in_one_folder(tmp_path, name):
    made = scenes(tmp_path, sub=".")
    put(tmp_path / name, NAMES)
    for image, things in made.items():
        put(tmp_path / image.replace("png", "txt"), yolo(things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert not found.kinds
    assert "read as YOLO" in found.said


@pytest.mark.parametrize("at", ["classes.txt", "labels/classes.txt"])
@pytest.mark.parametrize(
    "layout",
    [("images", "labels"), ("images/{}", "labels/{}"), ("{}/images", "{}/labels"), ("{}", "{}")],
)
def test_a_list_of_classes_and_folders(tmp_path, at, layout):
    put(tmp_path / at, NAMES)
    made = {}
    images, labels = layout
    splits = (("train", 0), ("val", 20)) if "{}" in images else (("train", 0),)
    for split, start in splits:
        made[split] = scenes(tmp_path, 4, images.format(split), start=start)
        for image, things in made[split].items():
            put(tmp_path / labels.format(split) / image.replace("png", "txt"), yolo(things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    if "val" in made:
        assert things_of(found.splits["valid"]) == sorted_things(made["val"])


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "classes.txt", b"\xef\xbb\xbfcircle\r\nrectangle\r\n\r\n")
    for image, things in made.items():
        text = "\ufeff" + yolo(things).replace("\n", "\r\n")
        put(tmp_path / "labels" / image.replace("png", "txt"), text.encode())
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.train.class_names == ["circle", "rectangle"]


def test_a_number_above_the_list_is_named(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "classes.txt", NAMES)
    for image, things in made.items():
        put(tmp_path / "labels" / image.replace("png", "txt"), yolo(things))
    put(tmp_path / "labels/img_0.txt", "2 0.5 0.5 0.1 0.1\n")
    assert "must begin with a class number, 0 to 1" in refusal(tmp_path)


def test_texts_that_are_no_labels_do_not_make_it_yolo(tmp_path):
    scenes(tmp_path)
    put(tmp_path / "classes.txt", NAMES)
    put(tmp_path / "labels/notes.txt", "these are notes\n")
    assert "no dataset found" in refusal(tmp_path)


def test_names_are_missing_or_doubled(tmp_path):
    made = scenes(tmp_path)
    for image, things in made.items():
        put(tmp_path / "labels" / image.replace("png", "txt"), yolo(things))
    put(tmp_path / "classes.txt", "circle\ncircle\n")
    assert "is another class's name too" in refusal(tmp_path)
    put(tmp_path / "classes.txt", "\n\n")
    assert "must list the classes' names" in refusal(tmp_path)


# openvinotoolkit/datumaro, tests/assets/yolo_dataset: yolov8_with_list_of_imgs, _with_subset_txt
@pytest.mark.parametrize("kind", ["images", "list"])
def test_images_that_data_yaml_lists(tmp_path, kind):
    made = scenes(tmp_path, 4, "images/train")
    for image, things in made.items():
        put(tmp_path / "labels/train" / image.replace("png", "txt"), yolo(things))
    listed = [f"images/train/{name}" for name in list(made)[:3]]
    train = "train.txt"
    if kind == "images":
        train = "".join(f"\n  - {name}" for name in listed)
    put(tmp_path / "train.txt", "".join(f"data/{name}\n" for name in listed))
    put(tmp_path / "data.yaml", f"path: .\ntrain: {train}\nnames: [circle, rectangle]\n")
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things({n: made[n] for n in list(made)[:3]})


# AlexeyAB/Yolo_mark: data/obj.data, data/train.txt that says data/img/air1.jpg, data/img/air1.txt
def test_yolo_mark_and_the_folder_above_it(tmp_path):
    made = scenes(tmp_path, sub="data/img")
    for image, things in made.items():
        put(tmp_path / "data/img" / image.replace("png", "txt"), yolo(things))
    put(tmp_path / "data/obj.names", NAMES.rstrip())
    put(tmp_path / "data/train.txt", "".join(f"data/img/{name}\n" for name in made))
    config = "classes= 2\ntrain  = data/train.txt\nvalid  = data/train.txt\nnames = data/obj.names"
    put(tmp_path / "data/obj.data", f"{config}\nbackup = backup/\n")
    said = refusal(tmp_path)
    assert f"data/ is YOLO: name {tmp_path / 'data'} instead" in said
    found = read(tmp_path / "data")
    assert things_of(found.train) == sorted_things(made)
    assert set(found.splits) == {"train"}
