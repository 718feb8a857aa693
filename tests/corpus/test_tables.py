"""CSV of boxes and CreateML's JSON, as Roboflow exports both and IBM's and Apple's tools do."""

from __future__ import annotations

import json

import pytest

from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    Thing,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


def rows(made: dict[str, list[Thing]]) -> str:
    return HEADER + "".join(
        f"{name},{WIDTH},{HEIGHT},{kind},{x},{y},{x + side},{y + side}\n"
        for name, things in made.items()
        for kind, x, y, side in things
    )


def createml(made: dict[str, list[Thing]], key: str = "image") -> list[dict]:
    return [
        {
            key: name,
            "annotations": [
                {
                    "label": kind,
                    "coordinates": {"x": x + s / 2, "y": y + s / 2, "width": s, "height": s},
                }
                for kind, x, y, s in things
            ],
        }
        for name, things in made.items()
    ]


@pytest.mark.parametrize("sub", [".", "images"])
def test_a_table(tmp_path, sub):
    made = scenes(tmp_path, sub=sub)
    put(tmp_path / "labels.csv", rows(made))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as CSV of boxes" in found.said
    assert not found.kinds


def test_tables_of_splits(tmp_path):
    """Roboflow: train/_annotations.csv; the tutorial: data/train_labels.csv and images/train/."""
    made = {}
    for split, start in (("train", 0), ("valid", 20)):
        made[split] = scenes(tmp_path / "roboflow", 3, split, start=start)
        put(tmp_path / "roboflow" / split / "_annotations.csv", rows(made[split]))
        scenes(tmp_path / "tutorial", 3, f"images/{split}", start=start)
        put(tmp_path / "tutorial/data" / f"{split}_labels.csv", rows(made[split]))
    for folder in ("roboflow", "tutorial"):
        found = read(tmp_path / folder)
        for split in ("train", "valid"):
            assert things_of(found.splits[split]) == sorted_things(made[split])


def test_bad_rows_are_named(tmp_path):
    made = scenes(tmp_path)
    bad = "img_0.png,160,120,car,a,1,2,3\nimg_1.png,9,9,car,1,1,5,5\n../x.png,,,car,1,1,5,5\n"
    bad += "img_2.png,160,120,,1,1,5,5\nimg_3.png\nimg_4.png,160,120,car,9,9,5,5\n"
    put(tmp_path / "labels.csv", rows({}) + bad + f"img_5.png,{'9' * 5000},x,car,1,1,50,50\n")
    said = refusal(tmp_path)
    for number in range(2, 8):
        assert f"labels.csv line {number}" in said
    assert "line 8" not in said
    put(tmp_path / "labels.csv", rows(made) + "x" * 200_000 + "\n")
    assert "must be CSV" in refusal(tmp_path)


# VoTT's CSV (panlabel 0.7.0, sample_valid.vott.csv), DeepForest's (deepforest 2.1.0, OSBS_029.csv)
@pytest.mark.parametrize(
    "heading",
    [
        '"image","xmin","ymin","xmax","ymax","label"',
        "image_path,xmin,ymin,xmax,ymax,label",
        "label,filename,xmin,ymin,xmax,ymax,class",  # the label is another column then
    ],
)
def test_columns_of_other_names(tmp_path, heading):
    made = scenes(tmp_path)
    lines = [
        f"x,{name},{x},{y},{x + side},{y + side},{kind}"
        for name, things in made.items()
        for kind, x, y, side in things
    ]
    cut = 0 if heading.startswith("label") else 2
    put(tmp_path / "labels.csv", "\n".join([heading, *(line[cut:] for line in lines)]))
    assert things_of(read(tmp_path).train) == sorted_things(made)


# Roboflow's "RetinaNet Keras CSV": c-palma0/facemask-data, train/_annotations.csv
def test_retinanets_tables_without_a_heading(tmp_path):
    made = {}
    for split, start in (("train", 0), ("valid", 20)):
        made[split] = scenes(tmp_path, 4, split, start=start)
        made[split]["img_0.png"] = []
        lines = [
            f"{name},{x},{y},{x + side},{y + side},{kind}"
            for name, things in made[split].items()
            for kind, x, y, side in things
        ]
        # as keras-retinanet has images without objects
        put(tmp_path / split / "_annotations.csv", "\n".join([*lines, "img_0.png,,,,,"]))
    found = read(tmp_path)
    for split in ("train", "valid"):
        assert things_of(found.splits[split]) == sorted_things(made[split])
    assert "read as CSV of boxes" in found.said


# panlabel 0.7.0, sample_valid.tfod.csv: corners as TensorFlow's records have them
def test_corners_that_are_shares(tmp_path):
    made = scenes(tmp_path)
    lines = [
        f"{name},{WIDTH},{HEIGHT},{kind},{x / WIDTH},{y / HEIGHT},"
        f"{(x + s) / WIDTH},{(y + s) / HEIGHT}"
        for name, things in made.items()
        for kind, x, y, s in things
    ]
    put(tmp_path / "labels.csv", HEADER + "\n".join(lines))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "boxes are shares of their images" in found.said


def test_shares_in_a_format_of_pixels_are_left_out_and_not_taken_for_specks(tmp_path):
    document = createml(scenes(tmp_path, sub="."))
    for entry in document:
        for box in entry["annotations"]:
            box["coordinates"] = {"x": 0.5, "y": 0.5, "width": 0.25, "height": 0.2}
    put(tmp_path / "a.json", document)
    said = refusal(tmp_path, max_drop=0.5)
    assert "all 12 boxes lie within the first pixel, as shares of an image do" in said


@pytest.mark.parametrize("key", ["image", "imagefilename"])
def test_createml(tmp_path, key):
    made = scenes(tmp_path, sub=".")
    put(tmp_path / "_annotations.createml.json", createml(made, key))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as CreateML" in found.said


def test_createml_in_splits(tmp_path):
    made = {}
    for split, start in (("train", 0), ("valid", 20)):
        made[split] = scenes(tmp_path, 3, split, start=start)
        put(tmp_path / split / "_annotations.createml.json", createml(made[split]))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["valid"]) == sorted_things(made["valid"])


def test_bad_createml_is_named(tmp_path):
    document = createml(scenes(tmp_path, sub="."))
    document[0]["annotations"][0]["coordinates"] = None
    document[1]["annotations"][0] = 7
    document[2]["annotations"][0]["label"] = " "
    document[3]["image"] = "/etc/passwd"
    document[4] = 7
    document[5]["annotations"] = {"x": 1}
    put(tmp_path / "a.json", json.dumps(document))
    said = refusal(tmp_path)
    for part in (
        *("[0]: annotations[0]", "[1]: annotations[0] is 7", "[2]: annotations[0]"),
        *("[3]: image is '/etc/passwd'", "[4]: image is missing", "[5]: annotations[0]"),
    ):
        assert part in said
