"""Numbers and colours of masks that name classes, and the files that say which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.datasets.formats.legends import read_legend
from app.errors import UserError
from tests.corpus.making import (
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)
from tests.corpus.test_mask_folders import drawn, masked

COLORS = {"circle": (200, 10, 30), "rectangle": (0, 128, 0)}


def painted(things: list[Thing], colors: dict = COLORS) -> Image.Image:
    pixels = np.zeros((*drawn(things).shape, 3), np.uint8)
    for name, x, y, side in things:
        pixels[y : y + side, x : x + side] = colors[name]
    return Image.fromarray(pixels)


def assert_classes(found, made) -> None:
    assert things_of(found.train) == sorted_things(made)
    assert mask_iou(found.train, made) == 1
    assert "each group of touching pixels is an object" in found.said


# The lists of names that labelme, CVAT, Kaggle, fastai, Darknet and Supervisely write
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "circle\nrectangle\n"),
        ("classes.txt", "background\ncircle\nrectangle\n"),
        ("classes.txt", "1 circle\n2 rectangle\n"),
        ("classes.txt", "0: background\n1: circle\n2: rectangle\n"),
        ("class_names.txt", "__ignore__\n_background_\ncircle\nrectangle\n"),
        ("codes.txt", "Void\ncircle\nrectangle\n"),
        ("obj.names", "circle\r\nrectangle\r\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:::\ncircle:::\nrectangle:::"),
        ("classes.json", '{"1": "circle", "2": "rectangle"}'),
        ("classes.json", '{"circle": 1, "rectangle": 2}'),
        ("classes.json", '["background", "circle", "rectangle"]'),
        # lightly-ai/labelformat, tests/fixtures/semantic_segmentation/pascalvoc
        (
            "class_id_to_name.json",
            '{"0": "background", "1": "circle", "2": "rectangle", "255": "void"}',
        ),
        (
            "classes.json",
            '{"classes": [{"id": 1, "name": "circle"}, {"id": 2, "name": "rectangle"}]}',
        ),
        ("classes.csv", "id,name\n1,circle\n2,rectangle\n"),
        ("obj_class_to_machine_color.json", '{"circle": [1, 1, 1], "rectangle": [2, 2, 2]}'),
        # Datumaro's common semantic segmentation (otx 2.6.0, tests/assets)
        ("dataset_meta.json", '{"label_map": {"0": "Other", "1": "circle", "2": "rectangle"}}'),
    ],
)  # fmt: skip
def test_files_of_names(tmp_path, name, content):
    made = masked(tmp_path)
    put(tmp_path / name, content)
    found = read(tmp_path)
    assert_classes(found, made)
    assert f"numbers in masks name classes, by {name}" in found.said


def test_names_beside_the_masks(tmp_path):
    made = masked(tmp_path)
    put(tmp_path / "masks/classes.txt", "circle\nrectangle\n")
    assert_classes(read(tmp_path), made)


def test_each_piece_of_a_class_is_an_object(tmp_path):
    made = masked(tmp_path, lambda things: drawn(things, {"circle": 2, "rectangle": 2}))
    put(tmp_path / "classes.txt", "background\ncat\ncircle\n")
    wanted = {name: [("circle", *t[1:]) for t in things] for name, things in made.items()}
    assert things_of(read(tmp_path).train) == sorted_things(wanted)


def test_objects_of_the_one_class_that_a_file_names(tmp_path):
    made = masked(tmp_path)
    put(tmp_path / "classes.txt", "background\ncell\n")
    wanted = {name: [("cell", *t[1:]) for t in things] for name, things in made.items()}
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(wanted)
    assert "taken to count objects" in found.said


@pytest.mark.parametrize("value", [1, 255])
def test_two_values_of_the_one_class_that_a_file_names(tmp_path, value):
    made = masked(tmp_path, lambda things: drawn(things, dict.fromkeys(COLORS, value)))
    put(tmp_path / "classes.txt", "cell\n")
    wanted = {name: [("cell", *t[1:]) for t in things] for name, things in made.items()}
    assert things_of(read(tmp_path).train) == sorted_things(wanted)


def test_two_values_and_two_classes_are_refused(tmp_path):
    masked(tmp_path, lambda things: drawn(things, dict.fromkeys(COLORS, 255)))
    put(tmp_path / "classes.txt", "circle\nrectangle\n")
    assert "as '255 circle'" in refusal(tmp_path)
    put(tmp_path / "classes.txt", "255 circle\n3 rectangle\n")
    assert {a.category_id for a in read(tmp_path).train.annotations} == {1}


def test_names_without_background_and_fewer_numbers_are_refused(tmp_path):
    """Whether the first name is of 0 or of 1 cannot be told."""
    masked(tmp_path)
    put(tmp_path / "classes.txt", "circle\nrectangle\nstar\n")
    said = refusal(tmp_path)
    assert "has 3 names, and masks have numbers up to 2" in said
    assert "as '1 circle'" in said
    put(tmp_path / "classes.txt", "1 circle\n2 rectangle\n3 star\n")
    assert len(read(tmp_path).train.annotations) == 12


def test_numbers_that_nothing_names_leave_their_image_out(tmp_path):
    masked(tmp_path)
    put(tmp_path / "classes.txt", "background\ncircle\nrectangle\n")
    put(tmp_path / "masks/img_0.png", Image.fromarray(drawn([("circle", 5, 5, 30)]) * 9))
    assert "has numbers that nothing names: 9" in refusal(tmp_path)
    assert len(read(tmp_path, max_drop=0.2).train.images) == 5


def test_classes_and_void(tmp_path):
    def draw(things: list[Thing]) -> np.ndarray:
        pixels = drawn(things)
        pixels[:2] = 255
        return pixels

    made = masked(tmp_path, draw)
    put(tmp_path / "classes.txt", "circle\nrectangle\n")
    found = read(tmp_path)
    assert found.kinds["void"] == 6
    assert len(found.train.annotations) == sum(map(len, made.values()))


def test_the_flag_decides(tmp_path):
    made = masked(tmp_path)
    found = read(tmp_path, masks="classes")
    wanted = {n: [(str(1 + (t[0] != "circle")), *t[1:]) for t in ts] for n, ts in made.items()}
    assert things_of(found.train) == sorted_things(wanted)
    assert found.kinds["numbers"] == 1
    assert "'1', '2'" in found.said
    put(tmp_path / "classes.txt", "circle\nrectangle\n")
    assert "numbers" not in read(tmp_path).kinds
    objects = read(tmp_path, masks="objects")
    assert objects.train.class_names == ["object"]


# CamVid on Kaggle (class_dict.csv), CamVid itself (label_colors.txt), CVAT (labelmap.txt)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("class_dict.csv", "name,r,g,b\nvoid,0,0,0\ncircle,200,10,30\nrectangle,0,128,0\n"),
        ("class_dict.csv", "name, r, g, b\ncircle, 200, 10, 30\nrectangle, 0, 128, 0\n"),
        ("class_dict_seg.csv", "name,r,g,b\nunlabeled,0,0,0\ncircle,200,10,30\nrectangle,0,128,0"),
        ("label_colors.txt", "200 10 30\tcircle\n0 128 0\t\trectangle\n"),
        ("labelmap.txt", "background:0,0,0::\ncircle:200,10,30::\nrectangle:0,128,0::\n"),
        ("palette.json", '{"circle": [200, 10, 30], "rectangle": "#008000"}'),
        ("classes.json", '[{"name": "circle", "color": "#c80a1e"}, '
                         '{"name": "rectangle", "color": [0, 128, 0]}]'),
    ],
)  # fmt: skip
def test_colours_by_a_palette_file(tmp_path, name, content):
    made = masked(tmp_path, painted)
    put(tmp_path / name, content)
    found = read(tmp_path)
    assert_classes(found, made)
    assert f"colours in masks name classes, by {name}" in found.said


def test_colours_of_gray_and_of_palette_pngs(tmp_path):
    """A mask that shows a gray class alone is read as gray; CVAT writes palettes as well."""
    colors = {"circle": (90, 90, 90), "rectangle": (0, 128, 0)}
    palette = [0, 0, 0, 0, 128, 0, 90, 90, 90]
    made = masked(tmp_path, lambda things: painted(things, colors))
    first, second = list(made)[:2]
    made[first] = [thing for thing in made[first] if thing[0] == "circle"]
    put(tmp_path / "masks/img_0.png", painted(made[first], colors))
    indexed = Image.fromarray(drawn(made[second], {"circle": 2, "rectangle": 1}), "P")
    indexed.putpalette(palette)
    put(tmp_path / "masks/img_1.png", indexed)
    put(tmp_path / "class_dict.csv", "name,r,g,b\ncircle,90,90,90\nrectangle,0,128,0\n")
    assert_classes(read(tmp_path), made)


def test_palette_pngs_whose_colours_are_named(tmp_path):
    def draw(things: list[Thing]) -> Image.Image:
        picture = Image.fromarray(drawn(things, {"circle": 7, "rectangle": 3}), "P")
        picture.putpalette([0] * 9 + [0, 128, 0] + [0] * 9 + [200, 10, 30])
        return picture

    made = masked(tmp_path, draw)
    put(tmp_path / "labelmap.txt", "background:0,0,0::\ncircle:200,10,30::\nrectangle:0,128,0::\n")
    assert_classes(read(tmp_path), made)


def test_colours_without_a_file_are_listed(tmp_path):
    masked(tmp_path, painted)
    said = refusal(tmp_path)
    assert "(200, 10, 30)" in said
    assert "(0, 128, 0)" in said
    assert "class_dict.csv: a line 'name,r,g,b'" in said
    assert len(read(tmp_path, masks="objects").train.annotations) == 12


def test_void_of_colours_is_named(tmp_path):
    made = masked(tmp_path, painted)
    text = "name,r,g,b\nrectangle,0,128,0\nvoid,200,10,30\n"
    put(tmp_path / "class_dict.csv", text)
    assert "name 'void' in the file of names" in refusal(tmp_path, void=3)
    rectangles = {n: [t for t in ts if t[0] == "rectangle"] for n, ts in made.items()}
    assert things_of(read(tmp_path).train) == sorted_things(rectangles)


def test_colours_that_the_file_lacks_leave_their_image_out(tmp_path):
    masked(tmp_path, painted)
    put(tmp_path / "class_dict.csv", "name,r,g,b\ncircle,200,10,30\nrectangle,0,128,0\n")
    put(tmp_path / "masks/img_0.png", Image.new("RGB", (160, 120), (1, 2, 3)))
    assert "has colours that nothing names: (1, 2, 3)" in refusal(tmp_path)
    assert len(read(tmp_path, max_drop=0.2).train.images) == 5


def test_camvid_as_kaggle_has_it(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 50), ("test", 90)):
        made[split] = masked(
            tmp_path, painted, images=split, masks=f"{split}_labels", name="{}_L.png",
            count=3, start=start, ending="png",
        )  # fmt: skip
    put(tmp_path / "class_dict.csv", "name,r,g,b\ncircle,200,10,30\nrectangle,0,128,0\n")
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert things_of(found.splits["test"]) == sorted_things(made["test"])


def test_a_folder_names_the_class_whatever_a_file_says(tmp_path):
    made = scenes(tmp_path)
    for name in COLORS:
        for image, things in made.items():
            mask = drawn([thing for thing in things if thing[0] == name])
            put(tmp_path / "masks" / name / image, Image.fromarray(mask))
    put(tmp_path / "classes.txt", "x\ny\nz\n")
    assert things_of(read(tmp_path).train) == sorted_things(made)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("classes.txt", "", "names no class"),
        ("classes.txt", b"\xff\xfe\0", "mend it"),
        ("classes.txt", "cat\ncat\n", "'cat' twice"),
        ("classes.txt", "1 cat\n1 dog\n", "number 1 twice"),
        ("classes.txt", "x" * 300, "name that is none"),
        ("classes.txt", "cat\n" * 600_000, "larger than a list"),
        ("classes.json", "{", "JSON"),
        ("classes.json", "3", "must be a list"),
        ("classes.json", '[{"id": 3}]', "without a name"),
        ("classes.json", '{"cat": [1, 2]}', "for a colour"),
        ("classes.json", '{"cat": [1, 2, 300]}', "for a colour"),
        ("classes.json", '{"cat": null}', "for a colour"),
        ("classes.json", "[[]]", "no class"),
        ("class_dict.csv", "name,r,g,b\ncat,1,2\n", "must have 4 cells"),
        ("class_dict.csv", "name,r,g,b\ncat,1,2,x\n", "for a number"),
        ("class_dict.csv", "name,r,g,b\n", "names no class"),
        ("labelmap.txt", "cat:1,2::\n", "for a colour"),
    ],
)
def test_files_of_names_that_are_none(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        read_legend(put(tmp_path / name, content))
    masked(tmp_path)
    assert name in refusal(tmp_path)


def test_a_list_is_not_looked_for_outside(tmp_path):
    made = masked(tmp_path / "set")
    outside = put(tmp_path / "secret.txt", "circle\nrectangle\n")
    Path(tmp_path / "set/classes.txt").symlink_to(outside)
    found = read(tmp_path / "set")
    assert found.train.class_names == ["object"]
    assert len(found.train.annotations) == sum(map(len, made.values()))


# otx 2.6.0, tests/assets/common_semantic_segmentation_dataset: a list in each split's folder
def test_lists_of_the_splits_and_one_class(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 50)):
        one = lambda things: drawn(things, dict.fromkeys(COLORS, 1))  # noqa: E731
        made[split] = masked(tmp_path / split, one, start=start)
        put(tmp_path / split / "dataset_meta.json", {"label_map": {"0": "Background", "1": "Box"}})
    found = read(tmp_path)
    for split, its in (("train", "train"), ("valid", "val")):
        wanted = {name: [("Box", *t[1:]) for t in things] for name, things in made[its].items()}
        assert things_of(found.splits[split]) == sorted_things(wanted)


def test_colours_of_datumaro(tmp_path):
    made = masked(tmp_path, painted)
    put(
        tmp_path / "dataset_meta.json",
        {
            "label_map": {"0": "background", "1": "circle", "2": "rectangle"},
            "segmentation_colors": [[0, 0, 0], [200, 10, 30], [0, 128, 0]],
        },
    )
    assert_classes(read(tmp_path), made)


# quantori/prj-covid-scoring, dataset/obj_class_to_machine_color.json: "Other" is a class of it
@pytest.mark.parametrize("name", ["Other", "unknown", "none"])
def test_what_is_called_other_is_a_class_unless_it_is_number_0(tmp_path, name):
    made = masked(tmp_path)
    put(tmp_path / "classes.json", {"circle": 1, name: 2})
    wanted = {
        image: [(name if t[0] == "rectangle" else t[0], *t[1:]) for t in things]
        for image, things in made.items()
    }
    assert things_of(read(tmp_path).train) == sorted_things(wanted)
    put(tmp_path / "classes.json", {name: 0, "circle": 1, "rectangle": 2})
    assert things_of(read(tmp_path).train) == sorted_things(made)
