"""Datumaro's JSON (openvinotoolkit.github.io/datumaro, data formats), as CVAT writes it too."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.corpus.making import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Thing,
    mask_iou,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    square,
    things_of,
)


def rle(x: int, y: int, side: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    return {"counts": coco_mask.encode(mask)["counts"].decode(), "size": [HEIGHT, WIDTH]}


def shape(thing: Thing, kind: str = "bbox", **more: object) -> dict:
    name, x, y, side = thing
    own = {
        "bbox": {"bbox": [x, y, side, side]},
        "polygon": {"points": square(x, y, side)},
        "mask": {"rle": rle(x, y, side) if kind == "mask" else None},
        "ellipse": {"points": [x, y, x + side, y + side]},
        "points": {"points": [x, y], "visibility": [2]},
        "polyline": {"points": [x, y, x + side, y]},
        "label": {},
    }[kind]
    fixed = {"id": 0, "type": kind, "attributes": {"occluded": False}, "group": 0, "z_order": 0}
    return {**fixed, "label_id": CLASSES.index(name), **own, **more}


def item(name: str, shapes: list, **more: object) -> dict:
    image = {"path": name, "size": [HEIGHT, WIDTH]}
    return {
        "id": name.rpartition(".")[0],
        "annotations": shapes,
        "attr": {},
        "image": image,
        **more,
    }


def document(items: list) -> dict:
    labels = [{"name": name, "parent": "", "attributes": []} for name in CLASSES]
    categories = {"label": {"labels": labels, "attributes": []}, "mask": {"colormap": []}}
    return {"info": {}, "categories": categories, "items": items}


def items(made: dict[str, list[Thing]], kind: str = "bbox") -> list[dict]:
    return [item(name, [shape(thing, kind) for thing in its]) for name, its in made.items()]


def test_boxes(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    put(tmp_path / "annotations/default.json", document(items(made)))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert found.said.startswith("no COCO JSON: read as Datumaro")
    assert not found.kinds


@pytest.mark.parametrize(("kind", "least"), [("polygon", 1), ("mask", 1), ("ellipse", 0.75)])
def test_masks(tmp_path, kind, least):
    made = scenes(tmp_path, sub="images/default")
    put(tmp_path / "annotations/default.json", document(items(made, kind)))
    assert mask_iou(read(tmp_path).train, made) >= least


@pytest.mark.parametrize("names", [("train", "val", "test"), ("default", "Validation", "Test")])
def test_subsets_are_splits(tmp_path, names):
    made = {}
    for index, name in enumerate(names):
        made[name] = scenes(tmp_path, 3, f"images/{name}", start=20 * index)
        put(tmp_path / f"annotations/{name}.json", document(items(made[name])))
    found = read(tmp_path)
    for split, name in zip(("train", "valid", "test"), names, strict=True):
        assert things_of(found.splits[split]) == sorted_things(made[name])
    put(tmp_path / "annotations/night.json", document(items(made[names[0]])))
    assert "the subsets 'night'" in refusal(tmp_path)


def test_items_whose_images_are_called_by_their_ids(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    listed = items(made)
    for entry in listed:
        del entry["image"]
    put(tmp_path / "annotations/default.json", document(listed))
    assert things_of(read(tmp_path).train) == sorted_things(made)


def test_a_group_is_one_object_and_a_box_beside_a_mask_is_its_own(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    listed = []
    for name, things in made.items():
        shapes = []
        for group, (kind, x, y, side) in enumerate(things, start=1):
            half = side // 2
            for top, height in ((y, half), (y + half, side - half)):
                corners = [x, top, x + side, top, x + side, top + height, x, top + height]
                thing = (kind, x, y, side)
                shapes.append(shape(thing, "polygon", points=corners, group=group))
            shapes.append(shape(thing, bbox=[x - 3, y - 3, side + 6, side + 6], group=group))
        listed.append(item(name, shapes))
    put(tmp_path / "annotations/default.json", document(listed))
    found = read(tmp_path).train
    assert len(found.annotations) == 12
    assert mask_iou(found, made) == 1


def test_labels_points_and_lines(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    listed = items(made)
    thing = made["img_0.png"][0]
    listed[0]["annotations"].append(shape(thing, "label"))
    put(tmp_path / "annotations/default.json", document(listed))
    assert read(tmp_path).kinds == {"tag": 1}
    listed[0]["annotations"] += [shape(thing, "points"), shape(thing, "polyline")]
    put(tmp_path / "annotations/default.json", document(listed))
    assert "is a points: understood are bbox, polygon, mask and ellipse" in refusal(tmp_path)
    found = read(tmp_path, max_drop=0.2)
    assert found.kinds == {"tag": 1, "shape": 2}
    assert things_of(found.train) == sorted_things(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_id": 9}, "must be the class's name"),
        ({"label_id": None}, "must be the class's name"),
        ({"label_id": True}, "must be the class's name"),
        ({"bbox": [1, 2, 3]}, "four finite numbers"),
        ({"bbox": [1, 2, 0, 3]}, "must have a width"),
        ({"type": "polygon", "points": [1, 2, 3]}, "has a polygon of 3 numbers"),
        ({"type": "mask", "rle": {"counts": "x", "size": [1, 2]}}, "must have the image's size"),
        ({"type": "mask", "rle": {"counts": "~~", "size": [HEIGHT, WIDTH]}}, "damaged"),
        ({"type": "mask", "rle": {"counts": [19200], "size": [HEIGHT, WIDTH]}}, "no pixel"),
        ({"type": "mask"}, "must have the image's size"),
        ({"type": "ellipse", "points": [1, 2]}, "four finite numbers"),
        ({"type": "ellipse", "points": [9, 9, 9, 9]}, "radius above 0"),
        ({"type": ["x"]}, "understood are"),
    ],
)
def test_bad_shapes_are_named(tmp_path, change, said):
    made = scenes(tmp_path, sub="images/default")
    listed = items(made)
    listed[0]["annotations"] = [{**listed[0]["annotations"][0], **change}]
    put(tmp_path / "annotations/default.json", document(listed))
    assert said in refusal(tmp_path)
    assert things_of(read(tmp_path, max_drop=0.1).train) == sorted_things({**made, "img_0.png": []})


def test_bad_items_are_named(tmp_path):
    made = scenes(tmp_path, sub="images/default")
    listed = items(made)
    listed[0] = 7
    listed[1]["image"]["path"] = "../../etc/passwd"
    listed[2]["image"] = {"size": [1, 2], "path": "img_2.png"}
    listed[3] = {"annotations": []}
    listed[4]["annotations"] = 7
    put(tmp_path / "annotations/default.json", document(listed))
    said = refusal(tmp_path)
    for part in ("[0] is 7", "items[1] is '../../etc", "items[2]: size is (2, 1)", "items[3] is"):
        assert part in said
    put(tmp_path / "annotations/default.json", '{"items": [], "categories": {}, "annotations"')
    assert "broken JSON" in refusal(tmp_path)
