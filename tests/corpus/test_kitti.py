"""KITTI's object detection set (cvlibs.net, devkit) and NVIDIA TAO's folders of the same files."""

from __future__ import annotations

import pytest

from tests.corpus.making import Thing, put, read, refusal, scenes, sorted_things, things_of


def lines(things: list[Thing], score: str = "") -> str:
    tail = "1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"
    return "".join(
        f"{kind} 0.00 0 -1.58 {x}.00 {y}.00 {x + side}.00 {y + side}.00 {tail}{score}\n"
        for kind, x, y, side in things
    )


DONT_CARE = "DontCare -1 -1 -10 5.0 5.0 50.0 50.0 -1 -1 -1 -1000 -1000 -1000 -10\n"


@pytest.mark.parametrize(
    ("labels", "images"),
    [
        ("label_2", "image_2"),
        ("training/label_2", "training/image_2"),
        ("labels", "images"),
        ("labels/train", "images/train"),
    ],
)
def test_boxes(tmp_path, labels, images):
    made = scenes(tmp_path, sub=images)
    for name, things in made.items():
        put(tmp_path / labels / name.replace("png", "txt"), lines(things) + DONT_CARE)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as KITTI" in found.said
    assert found.kinds == {"placeholder": 1}
    assert "6 boxes of it are left out" in found.said


def test_the_right_camera_is_not_taken_for_the_left(tmp_path):
    made = scenes(tmp_path, sub="training/image_2")
    scenes(tmp_path, sub="training/image_3", start=40)
    for name, things in made.items():
        put(tmp_path / "training/label_2" / name.replace("png", "txt"), lines(things, " 0.9"))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert {image.path.parent.name for image in found.train.images} == {"image_2"}


# lightly-ai/labelformat, tests/fixtures/object_detection/KITTI: "bicycle with space"
@pytest.mark.parametrize("score", ["", " 0.9"])
def test_classes_of_several_words(tmp_path, score):
    made = scenes(tmp_path)
    for name, things in made.items():
        made[name] = [(f"red {kind} sign", *rest) for kind, *rest in things]
        put(tmp_path / "labels" / name.replace("png", "txt"), lines(made[name], score))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_splits_and_empty_files(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 20)):
        made[split] = scenes(tmp_path, 3, f"{split}/images", start=start)
        for name, things in made[split].items():
            empty = name == "img_1.png"
            path = tmp_path / split / "labels" / name.replace("png", "txt")
            put(path, "" if empty else lines(things))
        made[split]["img_1.png"] = []
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])


def test_bad_lines_are_named(tmp_path):
    made = scenes(tmp_path, sub="image_2")
    at = tmp_path / "label_2"
    for name, things in made.items():
        put(at / name.replace("png", "txt"), lines(things))
    put(at / "img_1.txt", "Car 0.00 0 -1.58 5 5\n" + lines([("car", 500, 5, 9), ("car", 5, 5, 0)]))
    put(at / "ghost.txt", lines(made["img_0.png"]))
    put(at / "img_2.txt", b"\xff\xfe\x00")
    put(at / "img_3.txt", lines(made["img_3.png"]).replace("0.00", "1.2.3"))
    said = refusal(tmp_path)
    for part in (
        *("img_1.txt line 1", "img_1.txt line 2", "img_1.txt line 3", "ghost.txt is 'ghost.txt'"),
        *("img_2.txt", "must be UTF-8 text"),
    ):
        assert part in said, part
