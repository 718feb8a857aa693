"""COCO JSON under any name: what a file holds tells it, and its name tells the split."""

from __future__ import annotations

import pytest

from tests.corpus.making import coco, put, read, refusal, scenes, sorted_things, things_of


# as users of SAM 3, Detectron2 and MMDetection have them (facebookresearch/sam3#443)
@pytest.mark.parametrize(
    ("at", "name", "images"),
    [
        *((at, "{}", "images/{}") for at in (".", "annotations", "Annotations", "labels")),
        *(("annotations", name, "{}") for name in ("instances_{}", "my_set_{}", "{}2017")),
        *((".", "{}_annotations", images) for images in ("images/{}", "{}", "{}/images")),
    ],
)
def test_splits_by_the_names_of_files(tmp_path, at, name, images):
    made = {}
    for split, start in (("train", 0), ("val", 20), ("test", 40)):
        made[split] = scenes(tmp_path, 3, images.format(split), start=start)
        put(tmp_path / at / f"{name.format(split)}.json", coco(made[split]))
    found = read(tmp_path)
    for split, its in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert things_of(found.splits[split]) == sorted_things(made[its])
    assert not found.kinds
    assert "read as" not in found.said


def test_one_folder_of_images_for_all(tmp_path):
    made = scenes(tmp_path, 8)
    names = list(made)
    put(tmp_path / "train.json", coco({name: made[name] for name in names[:5]}))
    put(tmp_path / "val.json", coco({name: made[name] for name in names[5:]}))
    found = read(tmp_path)
    assert (len(found.train.images), len(found.splits["valid"].images)) == (5, 3)
    assert not found.kinds


def test_one_file_of_any_name_is_to_train_on(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "test.json", coco(made))
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("notes.json", {"categories": [{"id": 0, "name": "circle"}], "info": {}}),
        ("meta.json", {"classes": [], "tags": []}),
        ("captions.json", {"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}),
        ("panoptic.json", {"images": [], "annotations": [{"segments_info": []}]}),
        ("broken.json", '{"a":'),
        ("images.json", ["images", "annotations"]),
        ("annotations.json", {"a": [1]}),
    ],
)
def test_other_jsons_beside_do_not_count(tmp_path, name, other):
    made = scenes(tmp_path)
    put(tmp_path / "labels.json", coco(made))
    put(tmp_path / name, other)
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_a_broken_file_among_the_splits_is_said(tmp_path):
    made = scenes(tmp_path, 4, "images/train")
    put(tmp_path / "train.json", coco(made))
    put(tmp_path / "val.json", '{"images": [], "annotations": [')
    assert "val.json: broken JSON" in refusal(tmp_path)


def test_a_file_without_classes_takes_those_of_another(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 20)):
        made[split] = scenes(tmp_path, 4, f"images/{split}", start=start)
        document = coco(made[split])
        if split == "val":
            del document["categories"]
        put(tmp_path / f"{split}.json", document)
    found = read(tmp_path)
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])
    assert found.kinds == {"no categories": 1}
    assert "those of train.json are taken" in found.said
    (tmp_path / "train.json").unlink()
    assert "'categories' is missing" in refusal(tmp_path)  # there are none to take


def test_names_that_do_not_tell_the_split(tmp_path):
    made = scenes(tmp_path)
    for name in ("train", "old", "training"):
        put(tmp_path / f"{name}.json", coco(made))
    said = refusal(tmp_path)
    assert "old.json: must have train, val or test in its name" in said
    assert "training.json: is for train, as train.json is; keep one" in said


# the official layout, with every file of it (cocodataset.org)
def test_coco_2017(tmp_path):
    made = {}
    for split, start in (("train2017", 0), ("val2017", 20)):
        made[split] = scenes(tmp_path, 4, split, start=start)
        at = tmp_path / "annotations"
        put(at / f"instances_{split}.json", coco(made[split]))
        put(at / f"captions_{split}.json", {"images": [], "annotations": [{"caption": "x"}]})
        people = coco(made[split])
        people["categories"] = [{"id": 1, "name": "person", "keypoints": ["nose"]}]
        put(at / f"person_keypoints_{split}.json", people)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train2017"])
    assert things_of(found.splits["valid"]) == sorted_things(made["val2017"])


# pycocowriter 0.5.6, tests/example_coco.json: 128 images, none of them in the package
def test_images_that_are_all_missing_are_said_once(tmp_path):
    made = scenes(tmp_path / "elsewhere", 30)
    (tmp_path / "set").mkdir()
    put(tmp_path / "set/annotations.json", coco(made))
    said = refusal(tmp_path / "set")
    assert said.count("no such file") == 1
    assert "30 of 30 images are missing: images[0].file_name is 'img_0.png'" in said
    assert "put the images there" in said
    scenes(tmp_path / "set", 1)  # one is there: the others are said one by one
    assert refusal(tmp_path / "set").count("no such file") == 20
