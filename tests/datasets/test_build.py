from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from app.config.reading import ReadingConfig
from app.datasets.build import load_splits, shapes_dataset
from app.datasets.coco import Category
from app.errors import UserError
from tests.datasets.conftest import noise

SMALL = {"train": 3, "valid": 1, "width": 64, "height": 64}


def many_images(count: int, labelled: int | None = None) -> dict:
    """`count` images with one box each, or on the first `labelled` only."""
    box = {"category_id": 1, "bbox": [1, 2, 3, 4]}
    size = {"width": 40, "height": 30}
    labels = count if labelled is None else labelled
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in range(count)],
        "annotations": [{"id": i + 1, "image_id": i, **box} for i in range(labels)],
        "categories": [{"id": 1, "name": "dog"}],
    }


def ids(dataset) -> set[int]:
    return {image.id for image in dataset.images}


def test_potholes_in_their_mixed_layouts(potholes):
    splits = load_splits(potholes)
    assert splits.test is not None
    assert [len(s.images) for s in (splits.train, splits.valid, splits.test)] == [80, 5, 5]
    assert [len(s.annotations) for s in (splits.train, splits.valid, splits.test)] == [110, 5, 5]
    assert splits.notes == ()
    assert splits.train.categories == splits.valid.categories == (Category(0, "pothole"),)
    for image in (*splits.train.images, *splits.valid.images, *splits.test.images):
        with Image.open(image.path) as file:
            assert file.size == (image.width, image.height)


def test_a_validation_set_is_made_from_train_and_said(save):
    folder = save(many_images(20))
    splits = load_splits(folder)
    assert splits.test is not None
    assert (len(splits.valid.images), len(splits.test.images)) == (3, 3)  # 15 % of 20 each
    assert ids(splits.train) | ids(splits.valid) | ids(splits.test) == set(range(20))
    for split in (splits.train, splits.valid, splits.test):
        assert {a.image_id for a in split.annotations} == ids(split)
    assert splits.notes[:2] == (
        "no validation split: 3 of 20 training images (15 %, seed 0) set aside for validation",
        "no test split: 3 of 20 training images (15 %, seed 0) set aside for testing",
    )


def test_only_validation_is_made_where_a_test_set_is_given(save, tmp_path):
    save(many_images(20), "set/train")
    save(many_images(4), "set/test")
    splits = load_splits(tmp_path / "set")
    assert splits.test is not None
    assert [len(s.images) for s in (splits.train, splits.valid, splits.test)] == [17, 3, 4]
    assert not any("test split" in note for note in splits.notes)


@pytest.mark.parametrize("count", range(2, 8))
def test_a_few_images_are_split_as_far_as_they_go_and_that_is_said(save, count):
    splits = load_splits(save(many_images(count)))
    tested = len(splits.test.images) if splits.test else 0
    assert len(splits.train.images) + len(splits.valid.images) + tested == count
    assert len(splits.train.images) >= max(1, count // 2)
    assert (tested == 0) == any("too few to set any aside" in note for note in splits.notes)


def test_classes_are_shared_out_as_the_images_are(save):
    """Twenty images in each of two classes, six of a rare one: by chance a part would lack it."""
    document = many_images(46)
    document["categories"] = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    for index, annotation in enumerate(document["annotations"]):
        annotation["category_id"] = 3 if index >= 40 else 1 + index % 2
    folder = save(document)
    for seed in range(5):
        splits = load_splits(folder, seed=seed)
        assert splits.test is not None
        counts = [
            Counter(a.category_id for a in split.annotations)
            for split in (splits.train, splits.valid, splits.test)
        ]
        assert [count[3] for count in counts] == [4, 1, 1]
        assert all(2 <= count[i] <= 4 for count in counts[1:] for i in (1, 2))


def test_near_duplicates_stay_on_one_side(save):
    """Ten scenes, each thrice: as it is, compressed, and a copy that Roboflow has turned."""
    document = many_images(30)
    folder = save(document)
    for scene in range(10):
        names = [f"{scene}.png", f"{scene}_copy.jpg", f"{scene}_a.rf.1.png", f"{scene}_a.rf.2.png"]
        smooth = noise(f"scene {scene}", (8, 6)).resize((40, 30), Image.Resampling.BICUBIC)
        smooth.save(folder / names[0])
        smooth.save(folder / names[1], quality=80)
        other = noise(f"other {scene}", (8, 6)).resize((40, 30), Image.Resampling.BICUBIC)
        other.save(folder / names[2])
        other.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / names[3])
        for image, name in zip(document["images"][scene * 3 :], names[:2], strict=False):
            image["file_name"] = name
        document["images"][scene * 3 + 2]["file_name"] = names[2]
        document["images"].append(
            {**document["images"][0], "id": 30 + scene} | {"file_name": names[3]}
        )
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    for seed in range(5):
        splits = load_splits(folder, seed=seed)
        assert splits.test is not None
        sides = {
            image.path.name.replace("_copy", "").split(".")[0]: set()
            for image in splits.train.images
        }
        for number, split in enumerate((splits.train, splits.valid, splits.test)):
            for image in split.images:
                stem = image.path.name.replace("_copy", "").split(".")[0]
                sides.setdefault(stem, set()).add(number)
        assert all(len(side) == 1 for side in sides.values())
        assert len(splits.valid.images) in (5, 6, 7)


def test_images_that_are_all_alike_are_split_with_a_note(save):
    document = many_images(10)
    folder = save(document)
    for image in document["images"]:
        Image.new("RGB", (40, 30), "gray").save(folder / image["file_name"])
    splits = load_splits(folder)
    assert len(splits.valid.images) == 2
    assert any("too much alike" in note for note in splits.notes)


def test_images_whose_names_match_alike_stay_on_one_side(save, tmp_path):
    """Six patients in folders, four images each, and two that are of none."""
    document = many_images(26)
    for index, image in enumerate(document["images"]):
        image["file_name"] = f"site{index % 2}/patient{index % 6}/{index}.png"
    for index in (24, 25):
        document["images"][index]["file_name"] = f"site0/{index}.png"
    for image in document["images"]:
        (tmp_path / "set" / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
    folder = save(document, "set")
    for seed in range(5):
        splits = load_splits(folder, pattern=r"patient\d", seed=seed)
        assert splits.test is not None
        sides: dict[str, set[int]] = {}
        for number, split in enumerate((splits.train, splits.valid, splits.test)):
            for image in split.images:
                sides.setdefault(image.path.parent.name, set()).add(number)
        del sides["site0"]
        assert [len(side) for side in sides.values()] == [1] * 6
        assert any("2 of 26 file names do not match it, such as 24.png" in n for n in splits.notes)


def _coco(folder: Path, patients: list[str | int | None]) -> None:
    document = many_images(len(patients))
    for image, patient in zip(document["images"], patients, strict=True):
        image["patient"] = patient
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def _imagefolder(folder: Path, patients: list[str | int | None]) -> None:
    objects = {"bbox": [[1, 2, 3, 4]], "category": ["dog"]}
    lines = [
        json.dumps({"file_name": f"{index}.png", "patient": patient, "objects": objects})
        for index, patient in enumerate(patients)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def _table(folder: Path, patients: list[str | int | None]) -> None:
    rows = ["filename,class,xmin,ymin,xmax,ymax,Patient"]
    for index, patient in enumerate(patients):
        rows.append(f"{index}.png,dog,1,2,4,6,{'' if patient is None else patient}")
    (folder / "boxes.csv").write_text("\n".join(rows))


@pytest.mark.parametrize("write", [_coco, _imagefolder, _table])
def test_images_of_which_a_column_says_the_same_stay_on_one_side(write, tmp_path):
    """Six patients, four images each, and two that are of none."""
    patients = [("anna", "ben", 3, 4, 5, 6)[index % 6] for index in range(24)] + [None, None]
    for index in range(26):
        noise(str(index)).save(tmp_path / f"{index}.png")
    write(tmp_path, patients)
    reading = ReadingConfig(group_column="patient")
    for seed in range(5):
        parted = load_splits(tmp_path, reading=reading, seed=seed)
        folded = load_splits(tmp_path, reading=reading, seed=seed, folds=3)
        assert parted.test is not None
        sides = [[i.path for i in s.images] for s in (parted.train, parted.valid, parted.test)]
        folds = [[i.path for i in folded.fold(n).valid.images] for n in range(3)]
        for parts in (sides, folds):
            found: dict[object, set[int]] = {}
            for number, paths in enumerate(parts):
                for path in paths:
                    found.setdefault(patients[int(path.stem)], set()).add(number)
            del found[None]
            assert [len(side) for side in found.values()] == [1] * 6
        assert any("--group-column patient: 2 of 26 images lack it" in n for n in parted.notes)
    with pytest.raises(UserError, match=r"--group-column clinic: 26 of 26 images lack it"):
        load_splits(tmp_path, reading=ReadingConfig(group_column="clinic"))


def test_a_group_on_both_sides_of_given_splits_is_told(save):
    reading = ReadingConfig(group_column="patient")
    for split, patients in (("train", "aabbc"), ("valid", "cd"), ("test", "ac")):
        document = many_images(len(patients))
        for image, patient in zip(document["images"], patients, strict=True):
            image["file_name"] = f"{split}-{image['file_name']}"
            image["patient"] = patient
        folder = save(document, f"set/{split}").parent
    said = [note for note in load_splits(folder, reading=reading).notes if "group" in note]
    assert [note.partition(":")[0] for note in said] == ["valid", "test", "test"]
    assert "1 of 2 groups by --group-column are in train as well, such as c" in said[0]
    assert "2 of 2 groups by --group-column are in train as well, such as a" in said[1]
    assert not any("group" in note for note in load_splits(folder).notes)
    shutil.rmtree(folder / "valid")
    folded = load_splits(folder, reading=reading, folds=3)
    (said,) = [note for note in folded.notes if "group" in note]
    assert said.startswith("test: 2 of 2 groups by --group-column are in train as well")


def test_a_pattern_that_cannot_part_the_images(save):
    folder = save(many_images(10))
    with pytest.raises(UserError, match=r"dataset.group=x: 10 of 10 file names do not match"):
        load_splits(folder, pattern="x")
    splits = load_splits(folder, pattern="png")  # one group of all
    assert len(splits.valid.images) == 2
    assert any("too few groups by dataset.group=png" in note for note in splits.notes)


def test_the_split_follows_the_seed_and_not_the_order_of_the_json(save):
    document = many_images(20)
    first, again = (load_splits(save(document), seed=1) for _ in range(2))
    document["images"].reverse()
    turned = load_splits(save(document, "turned"), seed=1)
    other = load_splits(save(document), seed=2)
    assert ids(first.valid) == ids(again.valid) == ids(turned.valid)
    assert ids(first.valid) != ids(other.valid)


@pytest.mark.parametrize(
    ("count", "fraction", "valid"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.5, 5), (7, 0.15, 1)]
)
def test_both_sides_of_the_split_have_images(save, count, fraction, valid):
    splits = load_splits(save(many_images(count)), valid_fraction=fraction, test_fraction=0)
    assert splits.test is None
    assert (len(splits.train.images), len(splits.valid.images)) == (count - valid, valid)


def test_a_single_image_is_trained_and_validated_on_with_a_note(save):
    splits = load_splits(save(many_images(1)))
    assert splits.train == splits.valid
    assert "one training image" in splits.notes[0]


def test_limit_takes_a_seeded_subset_of_train_alone(save):
    folder = save(many_images(20))
    whole, limited, other = (
        load_splits(folder, limit=None),
        load_splits(folder, limit=4),
        load_splits(folder, limit=4, seed=5),
    )
    assert len(limited.train.images) == len(limited.train.annotations) == 4
    assert ids(limited.train) < ids(whole.train)
    assert ids(limited.train) != ids(other.train)
    assert limited.valid == whole.valid
    assert limited.notes[2] == "training on 4 of 14 images (limit, seed 0)"
    assert load_splits(folder, limit=99).train == whole.train


def test_arguments_out_of_range_are_all_named(tmp_path):
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path, valid_fraction=1.5, test_fraction=1, limit=0)
    assert len(caught.value.problems) == 3


def test_val_is_taken_for_valid_and_images_may_lie_in_the_datasets_folder(save, tmp_path):
    save(many_images(3), "set/train")
    save(many_images(2), "set/val")
    document = many_images(3)
    for image in document["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    path = tmp_path / "set" / "train" / "_annotations.coco.json"
    path.write_text(json.dumps(document))
    splits = load_splits(tmp_path / "set")
    assert (len(splits.train.images), len(splits.valid.images)) == (3, 2)


@pytest.mark.parametrize("name", ["annotations.json", "my labels.json"])
def test_other_names_of_the_json(save, name):
    folder = save(many_images(3))
    (folder / "_annotations.coco.json").rename(folder / name)
    assert len(load_splits(folder).train.images) == 2


def test_several_json_files_of_unknown_names(save):
    folder = save(many_images(4))
    (folder / "_annotations.coco.json").rename(folder / "b.json")
    (folder / "a.json").write_text("{}")
    assert len(load_splits(folder).train.images) == 2  # told by what it holds
    (folder / "a.json").write_text((folder / "b.json").read_text())
    with pytest.raises(UserError, match=r"a\.json: must have train, val or test.*\n.*b\.json: "):
        load_splits(folder)


def test_splits_that_disagree_on_ids_share_those_of_train(save, tmp_path):
    train = many_images(3)
    train["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    valid = many_images(2)
    valid["categories"] = [{"id": 1, "name": "cow"}, {"id": 5, "name": "dog"}]
    valid["annotations"][1]["category_id"] = 5
    save(train, "set/train")
    save(valid, "set/valid")
    splits = load_splits(tmp_path / "set")
    expected = (Category(1, "dog"), Category(2, "cat"), Category(3, "cow"))
    assert splits.train.categories == splits.valid.categories == expected
    assert [a.category_id for a in splits.train.annotations] == [1, 1, 1]
    assert [a.category_id for a in splits.valid.annotations] == [3, 1]
    assert splits.notes[-1] == "validation has objects of 'cow', which no training image has"


def test_category_0_that_one_split_does_not_use_is_kept(save, tmp_path):
    train, valid = many_images(3), many_images(2)
    categories = [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
    train["categories"] = valid["categories"] = categories
    train["annotations"][0]["category_id"] = 0
    save(train, "set/train")
    save(valid, "set/valid")
    splits = load_splits(tmp_path / "set")
    assert splits.valid.categories == (Category(0, "dog"), Category(1, "cat"))


def test_no_train_folder_names_those_that_are_there(save, tmp_path):
    save(many_images(2), "set/val")
    save(many_images(2), "set/test")
    with pytest.raises(UserError, match="no 'train' folder to train on; there is 'val', 'test'"):
        load_splits(tmp_path / "set")


def test_a_split_folder_without_json_and_two_validation_folders(save, tmp_path):
    save(many_images(2), "set/train")
    (tmp_path / "set" / "valid").mkdir()
    with pytest.raises(UserError, match="valid: no COCO JSON"):
        load_splits(tmp_path / "set")
    (tmp_path / "set" / "val").mkdir()
    with pytest.raises(UserError, match="both valid and val"):
        load_splits(tmp_path / "set")


def test_missing_and_empty_folders_and_files(tmp_path):
    for path in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(UserError, match="no such folder"):
            load_splits(path)
    with pytest.raises(UserError, match=r"the folder is empty; .* see docs/data\.md$"):
        load_splits(tmp_path)
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(UserError, match=r"_annotations\.coco\.json.*There is: cat\.jpg"):
        load_splits(tmp_path)


def test_no_images_and_no_annotations(save):
    with pytest.raises(UserError, match="lists no images"):
        load_splits(save(many_images(0)))
    with pytest.raises(UserError, match="has no annotations"):
        load_splits(save(many_images(3, labelled=0), "bare"))
    with pytest.raises(UserError, match="left to train on have no annotations"):
        load_splits(save(many_images(30, labelled=1), "rare"), limit=1)


def test_problems_of_all_splits_come_together(save, tmp_path):
    spoiled = many_images(2)
    spoiled["annotations"][0]["bbox"] = [0, 0, 0, 0]
    save(spoiled, "set/train")
    save(copy.deepcopy(spoiled), "set/valid")
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path / "set")
    assert [p.split(":")[0] for p in caught.value.problems] == [
        *(str(tmp_path / "set" / split / "_annotations.coco.json") for split in ("train", "valid")),
        "2 of 4 annotations would be left out (50 %), and 1 % may be",
    ]


def test_shapes_are_made_once_and_anew_for_other_settings(tmp_path):
    cache = tmp_path / "cache" / "shapes"

    def made() -> int:
        return (cache / "train").stat().st_mtime_ns

    assert shapes_dataset(cache, **SMALL) == cache
    first = made()
    shapes_dataset(cache, **SMALL)
    assert made() == first
    splits = load_splits(cache)
    assert (len(splits.train.images), len(splits.valid.images), splits.notes) == (3, 1, ())
    shapes_dataset(cache, **{**SMALL, "train": 4})
    assert len(load_splits(cache).train.images) == 4
    fourth = load_splits(cache).train.content_hash()
    shapes_dataset(cache, **{**SMALL, "train": 4, "seed": 1})
    assert load_splits(cache).train.content_hash() != fourth


def test_incomplete_shapes_are_made_anew(tmp_path):
    shapes_dataset(tmp_path / "s", **SMALL)
    next((tmp_path / "s" / "valid" / "images").iterdir()).unlink()
    shapes_dataset(tmp_path / "s", **SMALL)
    assert len(load_splits(tmp_path / "s").valid.images) == 1
