"""Pascal VOC as it lies about: folders, names and sets (FAULTS 10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.corpus.making import (
    HEIGHT,
    WIDTH,
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)


def voc(name: str, things: Sequence[Thing], size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    objects = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
        f"<xmax>{x + side}</xmax><ymax>{y + side}</ymax></bndbox></object>"
        for kind, x, y, side in things
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{sides}{objects}</annotation>"


def stem(name: str) -> str:
    return name.rpartition(".")[0]


# raccoon_dataset and most of Kaggle: annotations/ and images/; Oxford-IIIT Pet: annotations/xmls/
@pytest.mark.parametrize(
    "folder",
    ["Annotations", "annotations", "Annotation", "xmls", "labels", "annotations/xmls", "."],
)
@pytest.mark.parametrize("images", ["images", "JPEGImages", "."])
def test_xmls_in_a_folder_of_any_name(tmp_path, folder, images):
    made = scenes(tmp_path, sub=images)
    for name, things in made.items():
        put(tmp_path / folder / f"{stem(name)}.xml", voc(name, things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert "read as Pascal VOC" in found.said
    assert not found.kinds.keys() - {"other name"}


# TensorFlow's tutorials: images/train/*.jpg with their XMLs; Roboflow: train/*.jpg with theirs
@pytest.mark.parametrize("top", ["images", "."])
@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_xmls_beside_the_images_of_splits(tmp_path, top, valid):
    made = {}
    for split, start in (("train", 0), (valid, 20), ("test", 30)):
        # the same names in each split, so that a wrong pair shows
        made[split] = scenes(tmp_path / top, 3, split, start=start)
        for name, things in made[split].items():
            put(tmp_path / top / split / f"{stem(name)}.xml", voc(name, things))
    found = read(tmp_path)
    for split, its in (("train", "train"), ("valid", valid), ("test", "test")):
        assert things_of(found.splits[split]) == sorted_things(made[its])
    assert not found.kinds


def test_annotations_and_images_with_splits_of_their_own(tmp_path):
    made = {}
    for split, start in (("train", 0), ("val", 20)):
        made[split] = scenes(tmp_path, 3, f"images/{split}", start=start)
        for name, things in made[split].items():
            put(tmp_path / "annotations" / split / f"{stem(name)}.xml", voc(name, things))
    found = read(tmp_path)
    assert things_of(found.splits["valid"]) == sorted_things(made["val"])
    assert things_of(found.train) == sorted_things(made["train"])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        # labelImg and Label Studio (HumanSignal/label-studio-converter#139): no ending, a path
        (lambda name: stem(name), True),
        (lambda name: f"C:\\Users\\me\\pictures\\{name}", True),
        (lambda name: f"/home/me/{name}", True),
        (lambda name: f"../images/{name}", False),
        (lambda name: name.upper(), True),
        (lambda name: name.replace(".png", ".jpg"), True),  # converted since
        (lambda _: "", True),
        (lambda _: "000001.jpg", True),  # renamed since
    ],
)
def test_names_that_are_not_quite_the_files(tmp_path, write, said):
    made = scenes(tmp_path)
    for name, things in made.items():
        put(tmp_path / "annotations" / f"{stem(name)}.xml", voc(write(name), things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert ("other name" in found.kinds) == said


def test_a_stale_name_that_is_another_image_now(tmp_path):
    """Renumbered by one: each filename is the next XML's image."""
    made = scenes(tmp_path)
    for index, (name, things) in enumerate(made.items()):
        put(tmp_path / "annotations" / f"{stem(name)}.xml", voc(f"img_{index + 1}.png", things))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.kinds["other name"] == 6


def test_an_xml_of_another_name_than_its_image(tmp_path):
    made = scenes(tmp_path)
    for name, things in made.items():
        put(tmp_path / "annotations" / f"label-{stem(name)}.xml", voc(name, things))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def sets(folder: Path, kind: str = "Main", **lists: range) -> dict[str, list[Thing]]:
    made = scenes(folder, 10, "JPEGImages")
    for name, things in made.items():
        put(folder / "Annotations" / f"{stem(name)}.xml", voc(name, things))
    for split, numbers in lists.items():
        put(folder / f"ImageSets/{kind}/{split}.txt", "".join(f"img_{i}\n" for i in numbers))
    return made


@pytest.mark.parametrize("kind", ["Main", "Segmentation", "Layout"])
def test_official_splits(tmp_path, kind):
    made = sets(
        tmp_path, kind, train=range(4), val=range(4, 7), trainval=range(7), test=range(7, 9)
    )
    put(tmp_path / f"ImageSets/{kind}/circle_train.txt", "img_9  1\nimg_8 -1\n")
    found = read(tmp_path)
    for split, numbers in (("train", range(4)), ("valid", range(4, 7)), ("test", range(7, 9))):
        names = {f"img_{i}.png" for i in numbers}
        assert things_of(found.splits[split]) == {
            name: sorted(things) for name, things in made.items() if name in names
        }
    assert "1 XMLs are in none of its lists, such as img_9.xml" in found.said
    assert found.kinds == {"unlisted": 1}


def test_trainval_and_test_alone_as_voc_2007_has_them(tmp_path):
    sets(tmp_path, trainval=range(7), test=range(7, 10))
    found = read(tmp_path)
    assert {split: len(dataset.images) for split, dataset in found.splits.items()} == {
        "train": 7,
        "test": 3,
    }


def test_default_txt_of_cvat_and_names_without_an_xml(tmp_path):
    sets(tmp_path, default=range(12))
    found = read(tmp_path)
    assert len(found.train.images) == 10
    assert "2 names have no XML, such as img_10" in found.said


def test_boxes_of_floats_and_outlines(tmp_path):
    """Roboflow writes x1, y1, x2, …; LabelMe's old tool and CVAT's export of it pt/x and pt/y."""
    made = scenes(tmp_path)
    for name, things in made.items():
        text = voc(name, [])
        objects = ""
        for index, (kind, x, y, side) in enumerate(things):
            corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
            points = (
                "".join(
                    f"<x{i}>{px}.0</x{i}><y{i}>{py}</y{i}>" for i, (px, py) in enumerate(corners)
                )
                if index
                else "".join(f"<pt><x>{px}</x><y>{py}.00</y></pt>" for px, py in corners)
            )
            objects += f"<object><name>{kind}</name><polygon>{points}</polygon></object>"
        gone = "<object><name>circle</name><deleted>1</deleted></object>"
        objects += gone
        put(
            tmp_path / "annotations" / f"{stem(name)}.xml",
            text.replace("</annotation>", objects + "</annotation>"),
        )
    assert mask_iou(read(tmp_path).train, made) == 1


def test_other_xmls_beside_are_passed_over(tmp_path):
    made = scenes(tmp_path)
    for name, things in made.items():
        put(tmp_path / "annotations" / f"{stem(name)}.xml", voc(name, things))
    put(tmp_path / "annotations/pom.xml", "<?xml version='1.0'?><!-- x --><project/>")
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_bad_xmls_are_all_named(tmp_path):
    made = scenes(tmp_path)
    for name, things in made.items():
        put(tmp_path / "annotations" / f"{stem(name)}.xml", voc(name, things))
    at = tmp_path / "annotations"
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]><annotation><filename>img_0.png</filename></annotation>'
    put(at / "img_0.xml", bomb)
    put(at / "img_1.xml", voc("img_1.png", made["img_1.png"], (99, 98)))
    put(at / "img_2.xml", "<annotation><filename>img_2.png</filename>")
    put(at / "img_3.xml", voc("img_3.png", []).replace("</a", "<object><name>x</name></object></a"))
    put(at / "ghost.xml", voc("ghost.png", []))
    put(at / "empty.xml", "")
    said = refusal(tmp_path)
    for part in (
        *("DOCTYPE", "img_1.xml: size", "img_2.xml is 'img_2.xml': is broken XML"),
        *("img_3.xml: object[0]", "ghost.xml: filename is 'ghost.png': no such file", "empty.xml"),
    ):
        assert part in said


# QuantuM410/cctv-count-object-detection, Annotations/000001.xml: as CVAT writes them
# lightly-ai/labelformat, tests/fixtures/object_detection/PascalVOC: 540.0, and no fraction
@pytest.mark.parametrize("fraction", ["0.25", "0", "7.0"])
def test_xmls_that_count_from_0(tmp_path, fraction):
    made = scenes(tmp_path)
    for name, things in made.items():
        first = f"<xmin>{fraction}</xmin><ymin>3</ymin><xmax>20</xmax><ymax>33</ymax>"
        objects = f"<object><name>bus</name><bndbox>{first}</bndbox></object>"
        for kind, x, y, side in things:
            sides = (
                f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + side}</xmax><ymax>{y + side}</ymax>"
            )
            objects += f"<object><name>{kind}</name><bndbox>{sides}</bndbox></object>"
        put(
            tmp_path / "Annotations" / f"{stem(name)}.xml",
            voc(name, []).replace("</size>", f"</size>{objects}"),
        )
    found = read(tmp_path).train
    for image in found.images:
        bus, *others = found.annotations_by_image[image.id]
        assert bus.bbox_xywh == (float(fraction), 3, 20 - float(fraction), 30)
        boxes = sorted(annotation.bbox_xywh for annotation in others)
        assert boxes == sorted((x, y, s, s) for _, x, y, s in made[image.path.name])


# LabelMe's web tool: openvinotoolkit/datumaro, tests/assets/labelme_dataset
def test_masks_and_sizes_of_labelmes_xmls(tmp_path):
    made = scenes(tmp_path, sub="Images/day")
    for name, things in made.items():
        objects = ""
        for index, (kind, x, y, side) in enumerate(things):
            file = f"{stem(name)}_mask_{index}.png"
            mask = Image.new("L", (WIDTH, HEIGHT))
            mask.paste(255, (x, y, x + side, y + side))
            put(tmp_path / "Masks/day" / file, mask)
            drawn = f"<deleted>0</deleted><segm><box/><mask>{file}</mask></segm>"
            objects += f"<object><name>\n{kind}\n</name>{drawn}</object>"
        objects += "<object><name>gone</name><deleted>\n1\n</deleted></object>"
        sizes = f"<imagesize><nrows>{HEIGHT}</nrows><ncols>{WIDTH}</ncols></imagesize>"
        text = f"<annotation><filename>\n{name}\n</filename>{objects}{sizes}</annotation>"
        put(tmp_path / "Annotations/day" / f"{stem(name)}.xml", text)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert mask_iou(found.train, made) == 1
    (tmp_path / "Masks/day/img_0_mask_1.png").unlink()
    assert "no such mask in the dataset" in refusal(tmp_path)
    put(tmp_path / "Annotations/day/img_1.xml", text.replace(f"<nrows>{HEIGHT}", "<nrows>999"))
    assert "must be the image's 160 x 120 pixels" in refusal(tmp_path)
