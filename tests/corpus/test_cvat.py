"""CVAT for images 1.1 (docs.cvat.ai, XML annotation format), and CVAT's YOLO 1.1 and COCO."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.corpus.making import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Thing,
    coco,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
    yolo,
)

LABELS = "<labels><label><name>circle</name></label></labels>"
META = f"<version>1.1</version><meta><task>{LABELS}</task></meta>"


def shape(thing: Thing, kind: str = "box", more: str = "") -> str:
    name, x, y, side = thing
    right, low, half = x + side, y + side, side / 2
    attributes = {
        "box": f'xtl="{x}.00" ytl="{y}.00" xbr="{right}.00" ybr="{low}.00"',
        "polygon": f'points="{x},{y};{right}.00,{y};{right},{low};{x},{low}"',
        "ellipse": f'cx="{x + half}" cy="{y + half}" rx="{half}" ry="{half}"',
        "mask": f'rle="0, {side * side}" left="{x}" top="{y}" width="{side}" height="{side}"',
        "polyline": f'points="{x},{y};{right},{y}"',
        "points": f'points="{x},{y}"',
    }[kind]
    fixed = 'source="manual" occluded="0" z_order="0"'
    inner = '<attribute name="a">1</attribute>'
    return f'<{kind} label="{name}" {fixed} {attributes} {more}>{inner}</{kind}>'


def entry(name: str, shapes: str, subset: str = "", size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    part = f'subset="{subset}" ' if subset else ""
    sides = f'width="{size[0]}" height="{size[1]}"'
    return f'<image id="0" name="{name}" {part}{sides}>{shapes}</image>'


def xml(*entries: str) -> str:
    return (
        f'<?xml version="1.0" encoding="utf-8"?><annotations>{META}{"".join(entries)}</annotations>'
    )


def of(made: dict[str, list[Thing]], kind: str = "box", subset: str = "") -> list[str]:
    return [entry(n, "".join(shape(t, kind) for t in its), subset) for n, its in made.items()]


def test_boxes(tmp_path):
    made = scenes(tmp_path)
    put(tmp_path / "annotations.xml", xml(*of(made)))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.said.startswith("no COCO JSON: read as CVAT for images")
    assert not found.kinds
    assert all(a.segmentation is None for a in found.train.annotations)


@pytest.mark.parametrize(("kind", "least"), [("polygon", 1), ("mask", 1), ("ellipse", 0.75)])
def test_masks(tmp_path, kind, least):
    made = scenes(tmp_path, sub="images/default")
    put(tmp_path / "annotations.xml", xml(*of(made, kind)))
    assert mask_iou(read(tmp_path).train, made) >= least


def test_a_mask_goes_along_the_rows(tmp_path):
    """The example of the documentation: 3 x 4 pixels, of which the last runs may be missing."""
    scenes(tmp_path, 2)
    rle = '<mask label="car" rle="1, 2, 2, 1" left="6" top="7" width="3" height="4"/>'
    put(tmp_path / "annotations.xml", xml(entry("img_0.png", rle), entry("img_1.png", rle)))
    (first, _) = read(tmp_path).train.annotations
    rows, columns = np.nonzero(coco_mask.decode(first.segmentation))
    assert set(zip(rows, columns, strict=True)) == {(7, 7), (7, 8), (8, 8)}


def test_a_box_turns_clockwise_around_its_center(tmp_path):
    scenes(tmp_path, 2)
    box = '<box label="car" xtl="60" ytl="50" xbr="100" ybr="60" rotation="{}"/>'
    entries = [entry(f"img_{i}.png", box.format(turn)) for i, turn in enumerate((90, 30))]
    put(tmp_path / "annotations.xml", xml(*entries))
    upright, slanted = read(tmp_path).train.annotations
    assert upright.bbox_xywh == (75, 35, 10, 40)
    _, _, w, h = slanted.bbox_xywh
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    assert (w, h) == pytest.approx((40 * cos + 10 * sin, 40 * sin + 10 * cos), abs=1.5)
    mask = coco_mask.decode(slanted.segmentation)
    assert mask[int(55 + 15 * sin), int(80 + 15 * cos)]  # the right end is lower
    assert not mask[int(55 - 15 * sin), int(80 + 15 * cos)]


@pytest.mark.parametrize(
    "subsets",
    [("Train", "Validation", "Test"), ("train", "val", "test"), ("default", "val", "test")],
)
@pytest.mark.parametrize("layout", ["images/{}", "{}", "images/{}/deep"])
def test_subsets_are_splits(tmp_path, subsets, layout):
    entries, made = [], {}
    for start, subset in enumerate(subsets):
        made[subset] = scenes(tmp_path, 3, layout.format(subset), start=20 * start)
        prefix = "deep/" if "deep" in layout else ""
        named = {prefix + name: things for name, things in made[subset].items()}
        entries += of(named, subset=subset)
    put(tmp_path / "annotations.xml", xml(*entries))
    found = read(tmp_path)
    for split, subset in zip(("train", "valid", "test"), subsets, strict=True):
        assert things_of(found.splits[split]) == sorted_things(made[subset]), split


def test_subsets_that_are_no_splits(tmp_path):
    made = scenes(tmp_path, 4)
    names = list(made)
    entries = [*of({n: made[n] for n in names[:2]}, subset="day")]
    entries += of({n: made[n] for n in names[2:]}, subset="night")
    put(tmp_path / "annotations.xml", xml(*entries))
    assert len(read(tmp_path).train.images) == 4  # none tells a split: all are to train on
    put(tmp_path / "annotations.xml", xml(*entries[:2], *of({names[2]: []}, subset="train")))
    assert "the subsets 'day': beside others that are splits" in refusal(tmp_path)


def test_shapes_of_a_group_are_one_object(tmp_path):
    made = scenes(tmp_path)
    entries = []
    for name, things in made.items():
        shapes = ""
        for kind, x, y, side in things:
            half = side // 2
            for left, width in ((x, half), (x + half, side - half)):
                box = f'xtl="{left}" ytl="{y}" xbr="{left + width}" ybr="{y + side}"'
                shapes += f'<box label="{kind}" {box} group_id="3"/>'
        entries.append(entry(name, shapes))
    put(tmp_path / "annotations.xml", xml(*entries))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_lines_points_and_tags(tmp_path):
    made = scenes(tmp_path)
    shapes = "".join(shape(t) for t in made["img_0.png"]) + '<tag label="good" source="manual"/>'
    others = shape(made["img_0.png"][0], "polyline") + shape(made["img_0.png"][0], "points")
    rest = of({name: things for name, things in made.items() if name != "img_0.png"})
    put(tmp_path / "annotations.xml", xml(entry("img_0.png", shapes), *rest))
    found = read(tmp_path)
    assert found.kinds == {"tag": 1}
    assert "1 tags" in found.said
    put(tmp_path / "annotations.xml", xml(entry("img_0.png", shapes + others), *rest))
    assert "is a polyline: understood are box, polygon, mask and ellipse" in refusal(tmp_path)
    found = read(tmp_path, max_drop=0.2)
    assert found.kinds["shape"] == 2
    assert things_of(found.train) == sorted_things(made)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('<box label="car" xtl="a" ytl="1" xbr="2" ybr="3"/>', "must have finite numbers"),
        ('<box label="car" xtl="1" ytl="1" xbr="1" ybr="3"/>', "must have a width and a height"),
        ('<box label="" xtl="1" ytl="1" xbr="5" ybr="3"/>', "must be the class's name"),
        ('<box label="car" xtl="1" ytl="1" xbr="9" ybr="3" rotation="nan"/>', "finite numbers"),
        ('<polygon label="car" points=""/>', "must have finite numbers"),
        ('<polygon label="car" points="1,2;3,4"/>', "three or more"),
        ('<polygon label="car" points="1,2;3,4;5,inf"/>', "finite numbers"),
        ('<ellipse label="car" cx="9" cy="9" rx="-1" ry="2"/>', "radius above 0"),
        ('<mask label="car" rle="1,2" left="1" top="1" width="9999" height="9999"/>', "no more"),
        ('<mask label="car" rle="1,99" left="1" top="1" width="3" height="3"/>', "runs that fill"),
        ('<mask label="car" rle="x" left="1" top="1" width="3" height="3"/>', "covers no pixel"),
        ('<mask label="car" rle="0,9" left="1e9" top="1" width="3" height="3"/>', "no pixel"),
        ('<mask label="car" rle="0,9" left="1" top="1" width="-3" height="3"/>', "no more pixels"),
    ],
)
def test_bad_shapes_are_named(tmp_path, bad, said):
    made = scenes(tmp_path)
    put(tmp_path / "annotations.xml", xml(entry("img_0.png", bad), *of(made)[1:]))
    assert said in refusal(tmp_path)
    assert things_of(read(tmp_path, max_drop=0.1).train) == sorted_things({**made, "img_0.png": []})


def test_bad_files_are_named(tmp_path):
    made = scenes(tmp_path)
    sizes = entry("img_1.png", "", size=(99, 98))
    out = entry("../../etc/passwd", "")
    put(tmp_path / "annotations.xml", xml(sizes, out, "<image/>", *of(made)[2:]))
    said = refusal(tmp_path)
    for part in ("must be the image's 160 x 120", "'../../etc/passwd': no such", "image None is"):
        assert part in said
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]><annotations><image name="img_0.png"/></annotations>'
    put(tmp_path / "annotations.xml", bomb)
    assert "DOCTYPE" in refusal(tmp_path)
    put(tmp_path / "annotations.xml", "<annotations><image")
    assert "broken XML" in refusal(tmp_path)
    put(tmp_path / "annotations.xml", xml('<track id="0" label="car"/>'))
    assert "export it as 'CVAT for images 1.1'" in refusal(tmp_path)
    put(tmp_path / "annotations.xml", xml())
    assert "lists no images" in refusal(tmp_path)


# CVAT YOLO 1.1: obj.data, obj.names, train.txt with data/obj_train_data/… in front of what is here
@pytest.mark.parametrize("prefix", ["data/", ""])
@pytest.mark.parametrize("valid", [None, "valid", "val"])
def test_yolo_1_1(tmp_path, prefix, valid):
    lines = f"classes = 2\ntrain = {prefix}train.txt\nnames = {prefix}obj.names\nbackup = backup/\n"
    made = {}
    for split, start in (("train", 0), *(((valid, 20),) if valid else ())):
        at = f"obj_{split}_data"
        made[split] = scenes(tmp_path, 4, at, start=start)
        for name, things in made[split].items():
            put(tmp_path / at / name.replace("png", "txt"), yolo(things))
        put(tmp_path / f"{split}.txt", "".join(f"{prefix}{at}/{name}\n" for name in made[split]))
        lines += f"valid = {prefix}{valid}.txt\n" if split == valid else ""
    put(tmp_path / "obj.data", lines)
    put(tmp_path / "obj.names", "".join(f"{name}\n" for name in CLASSES))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made["train"])
    assert found.splits.keys() == ({"train", "valid"} if valid else {"train"})
    if valid:
        assert things_of(found.splits["valid"]) == sorted_things(made[valid])


def test_coco_of_cvat_beside_its_images(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    put(tmp_path / "annotations/instances_default.json", coco(made))
    assert things_of(read(tmp_path).train) == sorted_things(made)
