"""YOLO as it is found (FAULTS 6, 7; ultralytics/yolov5#5210, #6522; ultralytics#17489)."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.datasets.formats import yolo as reader
from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    put,
    read,
    refusal,
    scene,
    scenes,
    sorted_things,
    things_of,
    yolo,
)

DATA = "train: images/train\nnames: [circle, rectangle]\n"


def labelled(folder: Path, count: int = 6, **places: str):
    made = scenes(folder, count, places.get("images", "images/train"))
    for name, things in made.items():
        place = places.get("labels", "labels/train")
        put(folder / place / f"{Path(name).stem}.txt", yolo(things))
    return made


def test_labels_of_no_image_are_counted_by_name(tmp_path):
    made = labelled(tmp_path, 10)
    for index in range(5):
        path = tmp_path / f"labels/train/img_{index}.txt"
        path.rename(path.with_name(f"IMG {index}.txt"))
    put(tmp_path / "data.yaml", DATA)
    said = refusal(tmp_path)
    assert "labels/train/IMG 0.txt" in said
    assert "belongs to no image" in said
    found = read(tmp_path, max_drop=0.5)
    assert (found.kinds["orphan"], found.kinds["unlabelled"]) == (5, 5)
    assert len(found.train.images) == len(made)


@pytest.mark.parametrize("ending", ["cr2", "xyz"])
def test_an_image_of_a_kind_that_is_not_read_is_named(tmp_path, ending):
    labelled(tmp_path, 10)
    image = tmp_path / "images/train/img_0.png"
    image.rename(image.with_suffix(f".{ending}"))
    put(tmp_path / "data.yaml", DATA)
    assert f"belongs to img_0.{ending}, which is not read" in refusal(tmp_path)


@pytest.mark.parametrize("ending", ["jfif", "gif", "avif", "jpe", "ppm", "webp", "tif", "bmp"])
def test_images_of_every_kind_that_is_read_are_found(tmp_path, ending):
    labelled(tmp_path, 6)
    for path in (tmp_path / "images/train").iterdir():
        picture = scene(int(path.stem[-1]))[0]
        kind = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"}.get(ending, ending.upper())
        picture.save(path.with_suffix(f".{ending}"), format=kind)
        path.unlink()
    put(tmp_path / "data.yaml", DATA)
    assert len(read(tmp_path).train.images) == 6


def test_no_label_at_all_says_where_it_was_looked_for(tmp_path):
    scenes(tmp_path, 6, "images/train")
    put(tmp_path / "data.yaml", DATA)
    assert "looked for labels/train/img_0.txt" in refusal(tmp_path)


@pytest.mark.parametrize("numbers", [2, 3])
def test_of_a_pose_the_box_is_read(tmp_path, numbers):
    made = labelled(tmp_path)
    for name, things in made.items():
        lines = yolo(things).splitlines()
        for index, (_, x, y, side) in enumerate(things):
            for px, py in ((x, y), (x + side, y), (x, y + side)):
                seen = " 2" if numbers == 3 else ""
                lines[index] += f" {px / WIDTH} {py / HEIGHT}{seen}"
        put(tmp_path / f"labels/train/{Path(name).stem}.txt", "\n".join(lines))
    put(tmp_path / "data.yaml", DATA + f"kpt_shape: [3, {numbers}]\n")
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert all(annotation.segmentation is None for annotation in found.train.annotations)


@pytest.mark.parametrize("shape", ["3", "[3]", "[0, 2]", "[a, b]"])
def test_a_pose_of_no_shape_is_refused(tmp_path, shape):
    labelled(tmp_path)
    put(tmp_path / "data.yaml", DATA + f"kpt_shape: {shape}\n")
    assert "kpt_shape" in refusal(tmp_path)


# labelImg, Make Sense, Label Studio: a list of names in place of a data.yaml
LAYOUTS = {
    "apart": {"images": "images", "labels": "labels"},
    "labelImg": {"images": ".", "labels": "."},
    "splits": {"images": "images/train", "labels": "labels/train"},
    "splits first": {"images": "train/images", "labels": "train/labels"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["classes.txt", "obj.names"])
def test_without_a_data_yaml_a_list_of_names_serves(tmp_path, layout, names):
    made = labelled(tmp_path, **LAYOUTS[layout])
    put(tmp_path / names, "circle\nrectangle\n")
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "orphan" not in found.kinds


@pytest.mark.parametrize("prefix", ["data/", "", "/home/django/data/"])
def test_cvats_yolo(tmp_path, prefix):
    """CVAT's YOLO 1.1: obj.data, obj.names, train.txt, obj_train_data/ (cvat-ai/cvat#462)."""
    made = labelled(tmp_path, images="obj_train_data", labels="obj_train_data")
    put(tmp_path / "obj.names", "circle\nrectangle\n")
    put(tmp_path / "train.txt", "".join(f"{prefix}obj_train_data/{name}\n" for name in made))
    put(
        tmp_path / "obj.data",
        "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
    )
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_a_list_that_names_a_missing_image_drops_it(tmp_path):
    made = labelled(tmp_path, 10)
    put(tmp_path / "train.txt", "\n".join(f"images/train/{n}" for n in [*made, "gone.png"]))
    put(tmp_path / "data.yaml", DATA.replace("images/train", "train.txt"))
    assert "train.txt line 11" in refusal(tmp_path)
    assert len(read(tmp_path, max_drop=0.1).train.images) == 10


@pytest.mark.parametrize("ending", ["mp4", "wmv", "m4v", "nef"])
def test_films_beside_images_are_counted(tmp_path, ending):
    labelled(tmp_path, 10)
    put(tmp_path / f"images/train/clip.{ending}", "frames")
    put(tmp_path / "data.yaml", DATA)
    assert read(tmp_path).kinds["not read"] == 1


def test_the_dataset_is_walked_once_for_all_its_splits(tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        labelled(tmp_path, 2, images=f"images/{split}", labels=f"labels/{split}")
    put(tmp_path / "data.yaml", DATA + "val: images/val\ntest: images/test\n")
    walked, walk = [], reader.walk_images

    def noted(folder: Path):
        walked.append(folder)
        return walk(folder)

    monkeypatch.setattr(reader, "walk_images", noted)
    config = reader.read_config(tmp_path)
    for split in config.splits:
        reader.read(config, split)
    assert walked.count(tmp_path) == 1
    assert len(walked) == 4
