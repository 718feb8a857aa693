"""Splits that cannot be scored, and what is made where there are none (FAULTS 2)."""

from __future__ import annotations

import pytest

from app.config.compose import load_config
from app.datasets.build import load_splits, make_splits, settings_advice
from app.datasets.checked_copy import build, check
from tests.corpus.making import coco, put, read, refusal, scene, scenes, survey_of


def test_a_validation_split_without_objects_is_refused_before_training(tmp_path):
    put(tmp_path / "train/_annotations.coco.json", coco(scenes(tmp_path, 4, "train")))
    made = scenes(tmp_path, 3, "valid", start=50)
    put(tmp_path / "valid/_annotations.coco.json", coco({name: [] for name in made}))
    said = refusal(tmp_path)
    assert "valid: 'annotations' is []" in said
    assert "nothing to score" in said


def test_so_is_a_test_split(tmp_path):
    for split, start in (("train", 0), ("valid", 20)):
        made = scenes(tmp_path, 4, split, start=start)
        put(tmp_path / split / "_annotations.coco.json", coco(made))
    made = scenes(tmp_path, 2, "test", start=50)
    put(tmp_path / "test/_annotations.coco.json", coco({name: [] for name in made}))
    assert "test: 'annotations' is []" in refusal(tmp_path)


@pytest.mark.parametrize("labelled", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_made_splits_have_objects_however_few_images_do(tmp_path, labelled, seed):
    made = scenes(tmp_path, 20)
    few = {name: things if i < labelled else [] for i, (name, things) in enumerate(made.items())}
    put(tmp_path / "annotations.json", coco(few))
    splits = load_splits(tmp_path, seed=seed)
    assert splits.train.annotations
    assert splits.valid.annotations
    assert splits.test is None or splits.test.annotations
    parts = [splits.train, splits.valid, *([splits.test] if splits.test else [])]
    names = [image.path.name for part in parts for image in part.images]
    assert sorted(names) == sorted(made)  # each image in one split, none lost


def test_one_labelled_image_is_trained_and_validated_on_and_that_is_said(tmp_path):
    made = scenes(tmp_path, 10)
    few = {name: things if name == "img_3.png" else [] for name, things in made.items()}
    put(tmp_path / "annotations.json", coco(few))
    splits = load_splits(tmp_path)
    assert splits.train.annotations == splits.valid.annotations
    assert any("the figures say nothing about new images" in note for note in splits.notes)


def test_a_set_without_a_single_object_is_refused(tmp_path):
    put(tmp_path / "annotations.json", coco({name: [] for name in scenes(tmp_path)}))
    assert "nothing to train on" in refusal(tmp_path)


# --- classes, and objects, beyond what a model takes (FAULTS 14)


def test_classes_called_by_numbers_are_said(tmp_path):
    document = coco(scenes(tmp_path))
    for index, category in enumerate(document["categories"]):
        category["name"] = str(index)
    put(tmp_path / "annotations.json", document)
    assert "classes are called by numbers, such as '0'" in read(tmp_path).said


def test_one_class_in_two_spellings_over_two_splits_is_refused(tmp_path):
    for split, start, name in (("train", 0, "Traffic  Light"), ("valid", 20, "traffic light")):
        document = coco(scenes(tmp_path, 4, split, start=start))
        document["categories"][0]["name"] = name
        put(tmp_path / split / "_annotations.coco.json", document)
    assert "but for case or space" in refusal(tmp_path)


def test_more_objects_than_can_be_found_are_said(tmp_path):
    document = coco(scenes(tmp_path))
    template = document["annotations"][0]
    more = [
        {**template, "id": 100 + n, "bbox": [n % 100, n // 100, 20, 20], "segmentation": []}
        for n in range(250)
    ]
    document["annotations"] += more
    put(tmp_path / "annotations.json", document)
    splits = make_splits(survey_of(tmp_path), valid_fraction=0.3, test_fraction=0.3)
    said = [fault.remedy for fault in settings_advice(splits, load_config())]
    assert any("with 251" in line for line in said)


def test_the_same_object_twice_is_one_object(tmp_path):
    document = coco(scenes(tmp_path))
    document["annotations"] += [{**a, "id": a["id"] + 100} for a in document["annotations"]]
    put(tmp_path / "annotations.json", document)
    found = read(tmp_path)
    assert (found.kinds["same object"], len(found.train.annotations)) == (12, 12)


@pytest.mark.parametrize("name", ["__ignore__", "_background_"])
def test_labelmes_names_of_no_class_are_no_prompts(tmp_path, name):
    """wkentaro/labelme: its own converters leave them out."""
    document = coco(scenes(tmp_path))
    document["categories"][1]["name"] = name
    put(tmp_path / "annotations.json", document)
    found = read(tmp_path)
    assert found.train.class_names == ["circle"]
    assert len(found.train.annotations) == 6
    assert "placeholder" in found.kinds


# --- what lies there and is not used (FAULTS 6)


def test_images_in_no_labels_and_files_of_other_kinds_are_said(tmp_path):
    put(tmp_path / "annotations.json", coco(scenes(tmp_path)))
    put(tmp_path / "images/new.png", scene(77)[0])
    put(tmp_path / "images/raw.cr2", b"II*\0")
    put(tmp_path / "images/.hidden.png", b"")
    said = read(tmp_path).said
    assert "1 images are in no labels, such as new.png: not used" in said
    assert "1 .cr2: not read, such as raw.cr2" in said
    assert ".hidden" not in said


def test_two_classes_that_the_model_reads_as_one_are_refused(command, tmp_path):
    """A prompt is cut at 32 tokens."""
    document = coco(scenes(tmp_path))
    common = " ".join(["a long description of a thing on the left side of the road"] * 3)
    for index, category in enumerate(document["categories"]):
        category["name"] = f"{common} {index}"
    put(tmp_path / "annotations.json", document)
    words = ("--dataset-dir", tmp_path, "--output-dir", tmp_path / "out", "--model", "nano")
    done = command("train", *words)
    assert done.code == 2
    assert "are one prompt to this model" in done.err
    assert not (tmp_path / "out").exists()


# --- images that are in two splits, which a full decode finds


def same_images(folder, *splits):
    """Splits of one set of three images, and a training set of others."""
    put(folder / "train/_annotations.coco.json", coco(scenes(folder, 4, "train", start=20)))
    for split in splits:
        put(folder / split / "_annotations.coco.json", coco(scenes(folder, 3, split)))


# otx 2.6.0, tests/assets/car_tree_bug and common_semantic_segmentation_dataset
def test_a_test_split_that_is_the_validation_split_is_left_away(tmp_path):
    same_images(tmp_path / "set", "valid", "test")
    found = check(tmp_path / "set", "auto")
    assert {split: len(part.images) for split, part in found.survey.splits.items()} == {
        "train": 4,
        "valid": 3,
    }
    assert [fault.kind for fault in found.survey.faults] == ["same splits"]
    found.survey.require_sound(0)
    build(tmp_path / "set", tmp_path / "built", load_config())
    assert sorted(p.name for p in (tmp_path / "built").iterdir() if p.is_dir()) == [
        "train",
        "valid",
    ]


def test_an_image_is_left_out_of_test_before_valid_and_of_train_before_both(tmp_path):
    same_images(tmp_path, "valid", "test")
    put(tmp_path / "test/img_1.png", scene(40)[0])  # an image of its own
    put(tmp_path / "train/img_3.png", scene(1)[0])  # that of valid/img_1.png
    found = check(tmp_path, "auto").survey
    assert {split: len(part.images) for split, part in found.splits.items()} == {
        "train": 3,
        "valid": 3,
        "test": 1,
    }
    places = sorted(fault.place for fault in found.faults if fault.kind == "in two splits")
    assert places == ["test/img_0.png", "test/img_2.png", "train/img_3.png"]


# ultralytics' coco8.yaml and coco128.yaml name one folder for both
def test_files_of_training_in_the_other_splits_are_said(tmp_path):
    same_images(tmp_path, "valid")
    assert not any("as well" in note for note in load_splits(tmp_path).notes)
    same_images(tmp_path, "test")
    put(tmp_path / "test/img_1.png", scene(40)[0])  # an image of its own
    said = [note for note in load_splits(tmp_path).notes if "as well" in note]
    assert len(said) == 1
    assert said[0].startswith("test: 2 of 3 images are in valid as well, such as img_0.png: ")
    put(tmp_path / "train/img_3.png", scene(1)[0])
    said = [
        note.partition(", such")[0] for note in load_splits(tmp_path).notes if "as well" in note
    ]
    assert said == [
        "valid: 1 of 3 images are in train as well",
        "test: 2 of 3 images are in valid as well",
    ]


# ultralytics' coco128.yaml
def test_a_validation_split_of_training_images_is_left_away(tmp_path):
    """Also where it is told before training; some of train's are set aside in its place."""
    put(tmp_path / "set/labels/train/.keep", b"")
    for number in range(8):
        put(tmp_path / f"set/images/train/{number}.png", scene(number)[0])
        put(tmp_path / f"set/labels/train/{number}.txt", b"0 0.5 0.5 0.2 0.2\n")
    put(tmp_path / "set/data.yaml", b"train: images/train\nval: images/train\nnames: [thing]\n")
    found = check(tmp_path / "set", "auto").survey
    assert [fault.kind for fault in found.faults if fault.place == "valid"] == ["same splits"]
    found.require_sound(0)
    splits = load_splits(tmp_path / "set")
    remedy = "some of train's are set aside in its place; give it other images, or leave it out"
    assert f"valid lists only images of train: {remedy}" in splits.notes
    assert f"valid is '8 images, all of train': {remedy}" in str(found.faults[0])
    validated = {image.path.name for image in splits.valid.images}
    assert validated
    assert validated.isdisjoint(image.path.name for image in splits.train.images)
